"""Read nanochat's optimizer files: the ranks' parts are put together, and every array is filed under its parameter.

Three forms exist, all holding torch state dicts (`state` by parameter number, `param_groups` with the numbers):
one state dict with AdamW and Muon groups (since 2026-01-29), and before that a list of two, AdamW then Muon. Muon keeps
one stacked buffer a group, filed under the group's first parameter; the oldest Muon kept one buffer a parameter.
Parameter numbers have no names. They follow from the order of groups, from shapes, and from the model's order.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nanochat_jax.distributed.sharding import flatten_by_path, map_by_path
from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.interop.nanochat_model import naming, tensor_shapes, widen
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim.groups import GROUP_OF

NEWTON_SCHULZ_STEPS = 5  # iterations of nanochat's Muon; its files record them
LAST_MOMENTUM = 0.95  # of Muon in a file of ours, which records none: nanochat sets it anew before every step
SHARDED_FROM = 1024  # AdamW state of at least so many elements is split over the ranks by rows, smaller is replicated


def read_optimizer(folder: Path, step: int, config: GPTConfig) -> dict | None:
    """The optimizer's state at `step`, or None where there is no file of it. Keys are paths like "blocks/0/attn/c_q".

    groups: one dict a group with name, kind, lr, initial_lr, weight_decay; for kind "adamw" betas, eps; for "muon"
        momentum, beta2 (None for the Muon of 2025)
    exp_avg, exp_avg_sq, count: AdamW's moments (shape of the parameter) and steps taken
    momentum, second_momentum: Muon's, the second of shape (rows, 1) or (1, columns), and absent in 2025
    """
    files = _rank_files(folder, step)
    if not files:
        return None
    ranks = []
    for file in files:
        content = read_pt(file)
        with naming(file):
            ranks.append(_parts(content))
    with naming(files[0] if len(files) == 1 else folder / f"optim_{step:06d}_rank*.pt"):
        return Merge(ranks, config).result()


def recorded_groups(groups: list[dict]) -> dict[str, dict]:
    """What nanochat's groups record of ours: group name -> fields of `optim.AdamW` or `optim.Muon`, lr being the rate
    that schedules multiply."""
    recorded = {}
    for group in groups:
        fields = {"lr": group["initial_lr"], "weight_decay": group["weight_decay"]}
        if group["kind"] == "adamw":
            fields |= {"b1": group["betas"][0], "b2": group["betas"][1], "eps": group["eps"]}
        elif group["beta2"] is not None:
            fields["b2"] = group["beta2"]
        recorded[group["name"]] = fields
    return recorded


def nanochat_groups(recorded: Mapping[str, Mapping]) -> list[dict]:
    """The other way round: `groups` as `read_optimizer` gives them. ValueError: no rates are recorded."""
    groups = []
    for name, fields in recorded.items():
        if "lr" not in fields:  # our first conversions of nanochat's models
            raise ValueError(f"the checkpoint has no rate of group {name}: convert the model again, or --no-optimizer")
        group = {"name": name, "lr": fields["lr"], "initial_lr": fields["lr"], "weight_decay": fields["weight_decay"]}
        if "b1" in fields:
            group |= {"kind": "adamw", "betas": (fields["b1"], fields["b2"]), "eps": fields["eps"]}
        else:
            group |= {"kind": "muon", "momentum": LAST_MOMENTUM, "beta2": fields["b2"]}
        groups.append(group)
    return groups


def _rank_files(folder: Path, step: int) -> list[Path]:
    """The files of all ranks in order; the name without a rank is that of 2025-10."""
    found = [re.fullmatch(rf"optim_{step:06d}_rank([0-9]+)\.pt", p.name) for p in folder.iterdir()]
    ranks = {int(match[1]) for match in found if match}
    if not ranks:
        alone = folder / f"optim_{step:06d}.pt"
        return [alone] if alone.exists() else []
    files = [folder / f"optim_{step:06d}_rank{rank}.pt" for rank in sorted(ranks)]
    gap = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if gap is not None:
        missing = folder / f"optim_{step:06d}_rank{gap}.pt"
        raise FileNotFoundError(f"{missing} does not exist, but a higher rank's does: copy the files of all ranks")
    return files


def _parts(content: object) -> list[dict]:
    """The state dicts of a file; groups are marked with their kind."""
    parts = content if isinstance(content, list) else [content]
    kinds = ("adamw", "muon") if isinstance(content, list) else (None,)
    if len(parts) != len(kinds):
        raise Refused(f"it must hold one state dict or two (AdamW, Muon), got {len(parts)}")
    for part, kind in zip(parts, kinds):
        state, groups = (part.get(key) if isinstance(part, dict) else None for key in ("state", "param_groups"))
        if not isinstance(state, dict) or not isinstance(groups, list):
            raise Refused("it must hold state dicts with state and param_groups")
        numbers = []
        for group in groups:
            if not isinstance(group, dict) or not isinstance(group.get("params"), list) or not group["params"]:
                raise Refused("each of param_groups must have a list params")
            group.setdefault("kind", kind)
            if not isinstance(group["kind"], str) or group["kind"] not in ("adamw", "muon"):
                raise Refused(f"a group's kind must be adamw or muon, got {type(group['kind']).__name__}")
            numbers += group["params"]
        if not all(type(n) is int for n in numbers) or len(set(numbers)) != len(numbers):
            raise Refused("the params of its groups must be different integers")
        for number, entry in state.items():
            if number not in numbers or not isinstance(entry, dict):
                raise Refused(f"state {number!r:.20} belongs to no group or is not a dict")
    return parts


class Merge:
    """Ranks' state dicts on their way to one state by path. `ranks[r]` is rank r's list of one or two state dicts."""

    def __init__(self, ranks: list[list[dict]], config: GPTConfig):
        self.ranks = ranks
        self.world = len(ranks)
        self.shapes = {"/".join(map(str, path)): shape for path, shape in tensor_shapes(config).items()}
        self.matrices = [p for p in self.shapes if p.startswith("blocks/") and not p.endswith("/value_embed")]
        self.arrays = {key: {} for key in ("exp_avg", "exp_avg_sq", "count", "momentum", "second_momentum")}

    def result(self) -> dict:
        settings = [[[_settings(group) for group in part["param_groups"]] for part in rank] for rank in self.ranks]
        if any(others != settings[0] for others in settings):
            raise Refused("the ranks' files differ in their groups: they are not from one run and step")
        groups = [(part, group) for part, content in enumerate(self.ranks[0]) for group in content["param_groups"]]
        adamw = [(part, group) for part, group in groups if group["kind"] == "adamw"]
        muon = [(part, group) for part, group in groups if group["kind"] == "muon"]
        names = self.adamw_groups()
        if len(adamw) != len(names):
            raise Refused(f"this model has {len(names)} AdamW groups ({', '.join(names)}), the file {len(adamw)}")
        result = []
        for (part, group), (name, paths) in zip(adamw, names.items()):
            if len(group["params"]) != len(paths):
                raise Refused(f"group {name} must have {len(paths)} parameters, got {len(group['params'])}")
            for number, path in zip(group["params"], paths):
                self._read_adamw(part, number, path)
            result.append({"name": name, **_settings(group)})
        for part, group in muon:
            self._read_muon(part, group)
        if missing := [path for path in self.matrices if path not in self.arrays["momentum"]]:
            raise Refused(f"no Muon group has the momentum of {missing[0]} ({len(missing)} such matrices)")
        matrix = _settings(muon[0][1])
        for key in sorted(matrix.keys() - {"params"}):
            if len(values := {_settings(group)[key] for _, group in muon}) > 1:
                raise Refused(f"all Muon groups must have the same {key}, got {', '.join(sorted(map(str, values)))}")
        result.append({"name": "matrix", **matrix})
        return {"groups": [{k: v for k, v in group.items() if k != "params"} for group in result], **self.arrays}

    def adamw_groups(self) -> dict[str, list[str]]:
        """Our group names and their parameters, in nanochat's order; only those that this model has."""
        groups = {
            "unembedding": ["lm_head"],
            "embedding": ["wte"],
            "value_embedding": [path for path in self.shapes if path.endswith("/value_embed")],
            "resid": ["resid_lambdas"],
            "x0": ["x0_lambdas"],
            "smear": ["smear_gate", "smear_lambda", "backout_lambda"],
        }
        present = {name: [path for path in paths if path in self.shapes] for name, paths in groups.items()}
        return {name: paths for name, paths in present.items() if paths}

    def _entry(self, rank: int, part: int, number: int, allowed: set[str], what: str) -> dict:
        entry = self.ranks[rank][part]["state"].get(number, {})
        if unknown := entry.keys() - allowed:
            raise Refused(f"the state of {what} has an unknown {sorted(map(str, unknown))[0]:.40}")
        return entry

    def _read_adamw(self, part: int, number: int, path: str) -> None:
        keys = {"step", "exp_avg", "exp_avg_sq"}
        entries = [self._entry(rank, part, number, keys, path) for rank in range(self.world)]
        for rank, entry in enumerate(entries):
            if entry.keys() != keys:
                raise Refused(f"rank {rank} has no {sorted(keys - entry.keys())[0]} of {path} (state {number})")
        shape = self.shapes[path]
        sharded = self.world > 1 and np.prod(shape) >= SHARDED_FROM
        if sharded and shape[0] % self.world:
            raise Refused(f"{path} has {shape[0]} rows, which {self.world} ranks cannot share evenly")
        local = (shape[0] // self.world, *shape[1:]) if sharded else shape
        for key in ("exp_avg", "exp_avg_sq"):
            rows = entries[0][key].shape[:1] if isinstance(entries[0][key], np.ndarray) else ()
            if rows and 0 < rows[0] < local[0] and shape[0] % rows[0] == 0 and len(shape) > 1:
                raise Refused(
                    f"{key} of {path} has {self.world} x {rows[0]} of its {shape[0]} rows: copy the files of all ranks"
                )
            pieces = [
                widen(entry[key], local, f"{key} of {path} (state {number}, rank {rank} of {self.world})")
                for rank, entry in enumerate(entries[: self.world if sharded else 1])
            ]
            self.arrays[key][path] = np.concatenate(pieces) if sharded else pieces[0]
        counts = {_count(entry["step"], f"step of {path} (state {number})") for entry in entries}
        if len(counts) > 1:
            raise Refused(f"the ranks' files are of different steps of {path}: {sorted(counts)}")
        self.arrays["count"][path] = counts.pop()

    def _read_muon(self, part: int, group: dict) -> None:
        """Find out which matrices a group has: all those of the shapes in its buffers, in model order."""
        keys, numbers = {"momentum_buffer", "second_momentum_buffer"}, group["params"]
        states = [
            {n: e for n in numbers if (e := self._entry(rank, part, n, keys, f"parameter {n}"))}
            for rank in range(self.world)
        ]
        what = f"the Muon group of parameters {numbers[0]} to {numbers[-1]}"
        buffers = [entry.get("momentum_buffer") for state in states for entry in state.values()]
        if not buffers or not all(isinstance(buffer, np.ndarray) and buffer.ndim in (2, 3) for buffer in buffers):
            raise Refused(f"{what} has no momentum buffers with 2 or 3 axes")
        shapes = {buffer.shape[-2:] for buffer in buffers}
        members = [path for path in self.matrices if self.shapes[path] in shapes]
        if len(members) != len(numbers):
            raise Refused(f"{what} has {len(numbers)} members, the model {len(members)} of shape {sorted(shapes)}")
        if taken := [path for path in members if path in self.arrays["momentum"]]:
            raise Refused(f"two Muon groups hold the momentum of {taken[0]}")
        if buffers[0].ndim == 3:
            self._read_stacked(states, numbers[0], members)
        else:
            self._read_single(states, dict(zip(numbers, members)))

    def _read_stacked(self, states: list[dict], first: int, members: list[str]) -> None:
        """A rank's buffers hold its chunk of the group, which is padded where the group has no more members."""
        shape = self.shapes[members[0]]
        reduced = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
        chunk = -(-len(members) // self.world)
        for rank, state in enumerate(states):
            own = members[rank * chunk : (rank + 1) * chunk]
            if state.keys() - {first}:
                raise Refused(f"stacked Muon state belongs to parameter {first}, got some at {sorted(state)[-1]}")
            for key, target, one in (
                ("momentum_buffer", "momentum", shape),
                ("second_momentum_buffer", "second_momentum", reduced),
            ):
                buffer = state.get(first, {}).get(key)
                if buffer is None and not own:
                    continue
                name = f"{key} of {members[0]} and others of its shape (state {first}, rank {rank} of {self.world})"
                rows = buffer.shape[0] if isinstance(buffer, np.ndarray) and buffer.ndim == 3 else None
                if rows is None or not len(own) <= rows <= chunk:
                    raise Refused(f"{name} must hold {len(own)} to {chunk} matrices, got {rows}")
                stacked = widen(buffer[: len(own)], (len(own), *one), name)
                self.arrays[target].update(zip(own, stacked))

    def _read_single(self, states: list[dict], paths: dict[int, str]) -> None:
        """One buffer a parameter, on the rank that owned it."""
        for number, path in paths.items():
            holders = [state[number] for state in states if number in state]
            if not holders:
                raise Refused(f"no rank has the momentum of {path} (state {number}): the files of some may be missing")
            name = f"momentum_buffer of {path} (state {number})"
            if holders[0].keys() != {"momentum_buffer"}:
                raise Refused(f"{name} must be alone in its state, got {len(holders[0])} entries")
            self.arrays["momentum"][path] = widen(holders[0]["momentum_buffer"], self.shapes[path], name)


def _count(value: object, what: str) -> int:
    number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if type(number) not in (int, float) or not 0 <= number < 1 << 53 or number != int(number):
        raise Refused(f"{what} must be a whole number, got {number if type(number) in (int, float) else type(number)}")
    return int(number)


def _settings(group: dict) -> dict:
    """What a group remembers, checked. The Muon of 2025 knew neither weight decay nor beta2 (variance reduction)."""
    where = f"the group of parameter {group['params'][0]}"

    def number(key: str, value: object) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e300:
            shown = value if type(value) is float else type(value).__name__
            raise Refused(f"{where} must have a finite number {key}, got {shown}")
        return float(value)

    settings = {key: number(key, group.get(key)) for key in ("lr", "initial_lr")}
    settings["weight_decay"] = number("weight_decay", group.get("weight_decay", 0.0))
    if group["kind"] == "muon":
        settings["momentum"] = number("momentum", group.get("momentum"))
        settings["beta2"] = number("beta2", group["beta2"]) if "beta2" in group else None
    else:
        betas = group.get("betas")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise Refused(f"{where} must have two betas, got {type(betas).__name__}")
        settings["betas"] = tuple(number("betas", beta) for beta in betas)
        settings["eps"] = number("eps", group.get("eps"))
    return {"kind": group["kind"], "params": tuple(group["params"]), **settings}


def imported_arrays(state: dict) -> dict[str, Any]:
    """nanochat's optimizer state, as `read_optimizer` gives it, in the form of `optim.state_arrays`."""
    arrays = {}
    for kind in ("exp_avg", "exp_avg_sq", "momentum", "second_momentum"):
        for path, array in state[kind].items():
            arrays[f"{kind}/{path}"] = array
    for path, array in state["momentum"].items():  # era A's Muon had no second moment: it starts from zero
        r, c = array.shape
        arrays.setdefault(f"second_momentum/{path}", jnp.zeros((r, 1) if r >= c else (1, c)))
    counts = {
        path: (group, state["count"][path])
        for path, group in flatten_by_path(map_by_path(state["count"], GROUP_OF)).items()
    }
    for group, count in counts.values():
        if any(other != count for name, other in counts.values() if name == group):
            raise ValueError(f"parameters of one learning-rate group must have taken equally many steps: {counts}")
        arrays[f"count/{group}"] = jnp.int32(count)
    return arrays
