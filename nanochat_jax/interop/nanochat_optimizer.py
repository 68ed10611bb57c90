"""Read nanochat's optimizer files: the ranks' parts are put together, and every array is filed under its parameter.

Three forms exist, all holding torch state dicts (`state` by parameter number, `param_groups` with the numbers):
one state dict with AdamW and Muon groups (since 2026-01-29), and before that a list of two, AdamW then Muon. Muon keeps
one stacked buffer a group, filed under the group's first parameter; the oldest Muon kept one buffer a parameter.
Parameter numbers have no names. They follow from the order of groups, from shapes, and from the model's order.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.files.plain_pickle import Refused, naming_file
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.interop.nanochat_model import tensor_shapes, to_float32
from nanochat_jax.interop.optimizer_state import AdamWGroup, MuonGroup, OptimizerState, group_paths
from nanochat_jax.model.gpt import GPTConfig

SHARDED_FROM = 1024  # AdamW state of at least so many elements is split over the ranks by rows, smaller is replicated

Shapes = dict[str, tuple[int, ...]]  # by path


class StoredGroup(NamedTuple):
    """A group of parameters in the file of one rank."""

    settings: AdamWGroup | MuonGroup
    numbers: tuple[int, ...]  # of its parameters
    state: dict[int, dict[str, Any]]  # by number: moments and steps, also of other groups


Ranks = tuple[StoredGroup, ...]  # one group as every rank has it


def read_optimizer(folder: Path, step: int, config: GPTConfig) -> OptimizerState | None:
    """The optimizer's state at `step`, or None where there is no file of it."""
    files = _rank_files(folder, step)
    if not files:
        return None
    ranks = []
    for file in files:
        content = read_pt(file)
        with naming_file(file):
            ranks.append(_stored_groups(content))
    with naming_file(files[0] if len(files) == 1 else folder / f"optim_{step:06d}_rank*.pt"):
        return _merge(ranks, tensor_shapes(config))


def _rank_files(folder: Path, step: int) -> list[Path]:
    """The files of all ranks in order; the name without a rank is that of 2025-10."""
    found = [re.fullmatch(rf"optim_{step:06d}_rank([0-9]+)\.pt", p.name) for p in folder.iterdir()]
    ranks = sorted({int(match[1]) for match in found if match})
    if not ranks:
        alone = folder / f"optim_{step:06d}.pt"
        return [alone] if alone.exists() else []
    if gaps := [i for i, rank in enumerate(ranks) if i != rank]:
        missing = folder / f"optim_{step:06d}_rank{gaps[0]}.pt"
        raise FileNotFoundError(f"{missing} does not exist, but a higher rank's does: copy the files of all ranks")
    return [folder / f"optim_{step:06d}_rank{rank}.pt" for rank in ranks]


def _stored_groups(content: object) -> list[StoredGroup]:
    """The groups of a rank's one or two state dicts."""
    if not isinstance(content, list):
        return _groups_of(content, None)
    if len(content) != 2:
        raise Refused(f"it must hold one state dict or two (AdamW, Muon), got {len(content)}")
    return _groups_of(content[0], "adamw") + _groups_of(content[1], "muon")


def _groups_of(state_dict: object, kind: str | None) -> list[StoredGroup]:
    """kind: of the groups, where they do not say it themselves."""
    state, groups = (state_dict.get(k) if isinstance(state_dict, dict) else None for k in ("state", "param_groups"))
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
    return [StoredGroup(_settings(group), tuple(group["params"]), state) for group in groups]


def _settings(group: dict) -> AdamWGroup | MuonGroup:
    """What a group records. The Muon of 2025 knew neither weight decay nor beta2 (variance reduction)."""
    where = f"the group of parameter {group['params'][0]}"

    def number(key: str, value: object) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e300:
            shown = value if type(value) is float else type(value).__name__
            raise Refused(f"{where} must have a finite number {key}, got {shown}")
        return float(value)

    rates = [number(key, group.get(key)) for key in ("lr", "initial_lr")]
    weight_decay = number("weight_decay", group.get("weight_decay", 0.0))
    if group["kind"] == "muon":
        beta2 = number("beta2", group["beta2"]) if "beta2" in group else None
        return MuonGroup("muon", *rates, weight_decay, number("momentum", group.get("momentum")), beta2)
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise Refused(f"{where} must have two betas, got {type(betas).__name__}")
    both = tuple(number("betas", beta) for beta in betas)
    return AdamWGroup("adamw", *rates, weight_decay, both, number("eps", group.get("eps")))


def _merge(ranks: list[list[StoredGroup]], shapes: Shapes) -> OptimizerState:
    """One state from the groups of every rank."""
    described = [[(group.settings, group.numbers) for group in rank] for rank in ranks]
    if any(others != described[0] for others in described):
        raise Refused("the ranks' files differ in their groups: they are not from one run and step")
    stored: list[Ranks] = list(zip(*ranks))
    adamw = [group for group in stored if isinstance(group[0].settings, AdamWGroup)]
    muon = [group for group in stored if isinstance(group[0].settings, MuonGroup)]
    members = group_paths(shapes)
    matrices = {path: shapes[path] for path in members.pop("matrix")}
    if len(adamw) != len(members):
        raise Refused(f"this model has {len(members)} AdamW groups ({', '.join(members)}), the file {len(adamw)}")
    groups, arrays = {}, {}
    for group, (name, paths) in zip(adamw, members.items()):
        if len(group[0].numbers) != len(paths):
            raise Refused(f"group {name} must have {len(paths)} parameters, got {len(group[0].numbers)}")
        counts = {}
        for number, path in zip(group[0].numbers, paths):
            moments = _adamw_moments(group, number, path, shapes[path])
            arrays[f"exp_avg/{path}"], arrays[f"exp_avg_sq/{path}"], counts[path] = moments
        if len(set(counts.values())) > 1:
            raise Refused(f"the parameters of group {name} must have taken equally many steps, got {counts}")
        groups[name], arrays[f"count/{name}"] = group[0].settings, np.int32(counts[paths[0]])
    for group in muon:
        moments = _muon_moments(group, matrices)
        if taken := [name for name in moments if name in arrays]:
            raise Refused(f"two Muon groups hold the {taken[0].replace('/', ' of ', 1)}")
        arrays |= moments
    if missing := [path for path in matrices if f"momentum/{path}" not in arrays]:
        raise Refused(f"no Muon group has the momentum of {missing[0]} ({len(missing)} such matrices)")
    settings = [group[0].settings for group in muon]
    for key, values in zip(MuonGroup._fields, zip(*settings)):
        if len(set(values)) > 1:
            raise Refused(f"all Muon groups must have the same {key}, got {', '.join(sorted(map(str, set(values))))}")
    return OptimizerState(groups | {"matrix": settings[0]}, with_second_momenta(arrays))


def _entry(group: StoredGroup, number: int, allowed: set[str], what: str) -> dict[str, Any]:
    """What a rank keeps of a parameter, perhaps nothing."""
    entry = group.state.get(number, {})
    if unknown := entry.keys() - allowed:
        raise Refused(f"the state of {what} has an unknown {sorted(map(str, unknown))[0]:.40}")
    return entry


def rows_of_rank(path: str, shape: tuple[int, ...], world: int) -> int:
    """How many rows of the state of an AdamW parameter each of `world` ranks keeps. Refused: they cannot share them."""
    if world == 1 or np.prod(shape) < SHARDED_FROM:
        return shape[0]
    if shape[0] % world:
        raise Refused(f"{path} has {shape[0]} rows, which {world} ranks cannot share evenly")
    return shape[0] // world


def chunk_of_rank(members: list[str], rank: int, world: int) -> tuple[int, list[str]]:
    """(matrices in a rank's buffer of a Muon group, those members that lie in it); the last ranks may have fewer."""
    chunk = -(-len(members) // world)
    return chunk, members[rank * chunk : (rank + 1) * chunk]


def _adamw_moments(group: Ranks, number: int, path: str, shape: tuple) -> tuple[np.ndarray, np.ndarray, int]:
    """(first moment, second moment, steps taken) of a parameter."""
    keys, world = {"step", "exp_avg", "exp_avg_sq"}, len(group)
    entries = [_entry(rank, number, keys, path) for rank in group]
    for rank, entry in enumerate(entries):
        if entry.keys() != keys:
            raise Refused(f"rank {rank} has no {sorted(keys - entry.keys())[0]} of {path} (state {number})")
    local = (rows_of_rank(path, shape, world), *shape[1:])
    sharded = local != shape

    def whole(key: str) -> np.ndarray:
        first = entries[0][key]
        rows = first.shape[0] if isinstance(first, np.ndarray) and first.ndim else 0
        if 0 < rows < local[0] and shape[0] % rows == 0 and len(shape) > 1:
            raise Refused(f"{key} of {path} has {world} x {rows} of its {shape[0]} rows: copy the files of all ranks")
        pieces = [
            to_float32(entry[key], local, f"{key} of {path} (state {number}, rank {rank} of {world})")
            for rank, entry in enumerate(entries[: world if sharded else 1])
        ]
        return np.concatenate(pieces) if sharded else pieces[0]

    exp_avg, exp_avg_sq = whole("exp_avg"), whole("exp_avg_sq")
    counts = {_whole_number(entry["step"], f"step of {path} (state {number})") for entry in entries}
    if len(counts) > 1:
        raise Refused(f"the ranks' files are of different steps of {path}: {sorted(counts)}")
    return exp_avg, exp_avg_sq, counts.pop()


def _whole_number(value: object, what: str) -> int:
    number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if type(number) not in (int, float) or not 0 <= number < 1 << 31 or number != int(number):
        raise Refused(f"{what} must be a whole number, got {number if type(number) in (int, float) else type(number)}")
    return int(number)


def _muon_moments(group: Ranks, matrices: Shapes) -> dict[str, np.ndarray]:
    """momentum/<path> and second_momentum/<path> of a group's matrices: all of the shapes in its buffers."""
    keys, numbers = {"momentum_buffer", "second_momentum_buffer"}, group[0].numbers
    states = [{n: entry for n in numbers if (entry := _entry(rank, n, keys, f"parameter {n}"))} for rank in group]
    what = f"the Muon group of parameters {numbers[0]} to {numbers[-1]}"
    buffers = [entry.get("momentum_buffer") for state in states for entry in state.values()]
    if not buffers or not all(isinstance(buffer, np.ndarray) and buffer.ndim in (2, 3) for buffer in buffers):
        raise Refused(f"{what} has no momentum buffers with 2 or 3 axes")
    found = {buffer.shape[-2:] for buffer in buffers}
    members = {path: shape for path, shape in matrices.items() if shape in found}
    if len(members) != len(numbers):
        raise Refused(f"{what} has {len(numbers)} members, the model {len(members)} of shape {sorted(found)}")
    if buffers[0].ndim == 3:
        return _stacked_moments(states, numbers[0], members)
    moments = {}
    for number, (path, shape) in zip(numbers, members.items()):  # one buffer a parameter, on the rank that owned it
        holders = [state[number] for state in states if number in state]
        if not holders:
            raise Refused(f"no rank has the momentum of {path} (state {number}): the files of some may be missing")
        name = f"momentum_buffer of {path} (state {number})"
        if holders[0].keys() != {"momentum_buffer"}:
            raise Refused(f"{name} must be alone in its state, got {len(holders[0])} entries")
        moments[f"momentum/{path}"] = to_float32(holders[0]["momentum_buffer"], shape, name)
    return moments


def _stacked_moments(states: list[dict[int, dict]], first: int, members: Shapes) -> dict[str, np.ndarray]:
    """A rank's buffers hold its chunk of the group, which is padded where the group has no more members."""
    paths, (r, c), world = list(members), next(iter(members.values())), len(states)
    moments = {}
    for rank, state in enumerate(states):
        chunk, own = chunk_of_rank(paths, rank, world)
        if state.keys() - {first}:
            raise Refused(f"stacked Muon state belongs to parameter {first}, got some at {sorted(state)[-1]}")
        for kind, shape in (("momentum", (r, c)), ("second_momentum", (r, 1) if r >= c else (1, c))):
            buffer = state.get(first, {}).get(f"{kind}_buffer")
            if buffer is None and not own:
                continue
            what = f"{kind}_buffer of {paths[0]} and others of its shape (state {first}, rank {rank} of {world})"
            rows = buffer.shape[0] if isinstance(buffer, np.ndarray) and buffer.ndim == 3 else None
            if rows is None or not len(own) <= rows <= chunk:
                raise Refused(f"{what} must hold {len(own)} to {chunk} matrices, got {rows}")
            matrices = to_float32(buffer[: len(own)], (len(own), *shape), what)
            moments |= {f"{kind}/{path}": matrix for path, matrix in zip(own, matrices)}
    return moments


def with_second_momenta(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays with zeros for Muon's second momenta where they are missing, as in nanochat's files of 2025."""
    zeros = {}
    for name, array in arrays.items():
        if name.startswith("momentum/"):
            r, c = array.shape
            zeros[f"second_{name}"] = np.zeros((r, 1) if r >= c else (1, c), np.float32)
    return zeros | arrays
