"""The state of nanochat's optimizer by parameter, and its translation to and from what our checkpoints hold.

Paths are text such as "blocks/0/attn/c_q". Arrays are float32.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nanochat_jax.optim.groups import GROUP_OF

LAST_MOMENTUM = 0.95  # of Muon in a file of ours, which records none: nanochat sets it anew before every step


class AdamWGroup(NamedTuple):
    """What nanochat records of a group under AdamW."""

    kind: str  # "adamw"
    lr: float  # of the last step
    initial_lr: float  # the rate that schedules multiply
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class MuonGroup(NamedTuple):
    """What nanochat records of a group under Muon."""

    kind: str  # "muon"
    lr: float  # of the last step
    initial_lr: float  # the rate that schedules multiply
    weight_decay: float
    momentum: float
    beta2: float | None  # of the second moment; None for the Muon of 2025, which had none


NanochatGroups = dict[str, AdamWGroup | MuonGroup]  # by our names, in nanochat's order; "matrix" is Muon's


@dataclass(frozen=True)
class OptimizerState:
    """One optimizer over all parameters; all dictionaries but the first are by path."""

    groups: NanochatGroups
    exp_avg: dict[str, np.ndarray]  # AdamW's first moment, of the parameter's shape
    exp_avg_sq: dict[str, np.ndarray]  # AdamW's second moment, of the parameter's shape
    count: dict[str, int]  # AdamW's steps taken
    momentum: dict[str, np.ndarray]  # Muon's, of the parameter's shape
    second_momentum: dict[str, np.ndarray]  # Muon's, (rows, 1) or (1, columns); of 2025 there is none

    def __getitem__(self, name: str) -> Any:  # until checkpoints/find.py is rewritten
        return getattr(self, name)


def group_paths(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its parameters, both in nanochat's order where `paths` is; only groups that have a parameter."""
    members = {name: [path for path in paths if re.fullmatch(pattern, path)] for pattern, name in GROUP_OF}
    return {name: paths for name, paths in members.items() if paths}


def named_arrays(state: OptimizerState) -> dict[str, Any]:
    """The arrays by the names of our checkpoints (see `optim.groups.state_arrays`)."""
    arrays = {
        f"{kind}/{path}": array
        for kind in ("exp_avg", "exp_avg_sq", "momentum", "second_momentum")
        for path, array in getattr(state, kind).items()
    }
    for path, array in state.momentum.items():  # what the Muon of 2025 lacks starts from zero
        r, c = array.shape
        arrays.setdefault(f"second_momentum/{path}", jnp.zeros((r, 1) if r >= c else (1, c)))
    for name, paths in group_paths(state.count).items():
        counts = {path: state.count[path] for path in paths}
        if len(set(counts.values())) > 1:
            raise ValueError(f"parameters of one learning-rate group must have taken equally many steps: {counts}")
        arrays[f"count/{name}"] = jnp.int32(counts[paths[0]])
    return arrays


def from_named_arrays(arrays: Mapping[str, Any], groups: NanochatGroups) -> OptimizerState:
    """The state whose arrays have the names of our checkpoints; what else is among them is left out."""
    by_kind = {kind: {} for kind in ("exp_avg", "exp_avg_sq", "count", "momentum", "second_momentum")}
    for name, array in arrays.items():
        kind, _, path = name.partition("/")
        if kind in by_kind:
            by_kind[kind][path] = array
    counts = by_kind.pop("count")
    members = group_paths(by_kind["exp_avg"])
    count = {path: int(counts[group]) for group, paths in members.items() for path in paths}
    return OptimizerState(groups, count=count, **by_kind)


def recorded_groups(groups: NanochatGroups) -> dict[str, dict]:
    """Group -> those fields of `optim.AdamW` or `optim.Muon` that nanochat's file records."""
    recorded = {}
    for name, group in groups.items():
        recorded[name] = {"lr": group.initial_lr, "weight_decay": group.weight_decay}
        if isinstance(group, AdamWGroup):
            recorded[name] |= {"b1": group.betas[0], "b2": group.betas[1], "eps": group.eps}
        elif group.beta2 is not None:
            recorded[name]["b2"] = group.beta2
    return recorded


def nanochat_groups(recorded: Mapping[str, Mapping]) -> NanochatGroups:
    """The inverse of `recorded_groups`. ValueError: no rates are recorded."""
    groups = {}
    for name, fields in recorded.items():
        if "lr" not in fields:  # our first conversions of nanochat's models
            raise ValueError(f"the checkpoint has no rate of group {name}: convert the model again, or --no-optimizer")
        lr, weight_decay, b2 = fields["lr"], fields["weight_decay"], fields["b2"]
        if "b1" in fields:
            groups[name] = AdamWGroup("adamw", lr, lr, weight_decay, (fields["b1"], b2), fields["eps"])
        else:
            groups[name] = MuonGroup("muon", lr, lr, weight_decay, LAST_MOMENTUM, b2)
    return groups


def groups_to_json(groups: NanochatGroups) -> list[dict]:
    return [{"name": name, **group._asdict()} for name, group in groups.items()]


def groups_from_json(stored: list[dict]) -> NanochatGroups:
    groups = {}
    for fields in map(dict, stored):
        name = fields.pop("name")
        if fields["kind"] == "muon":
            groups[name] = MuonGroup(**fields)
        else:
            groups[name] = AdamWGroup(**fields | {"betas": tuple(fields["betas"])})  # JSON has lists
    return groups


def imported_arrays(state: Any) -> dict[str, Any]:  # until checkpoints/find.py is rewritten
    return named_arrays(state if isinstance(state, OptimizerState) else OptimizerState({}, **state))
