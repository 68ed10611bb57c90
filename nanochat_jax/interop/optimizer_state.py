"""The state of nanochat's optimizer, with its arrays under the names that our checkpoints give them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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


class OptimizerState(NamedTuple):
    """One optimizer over all parameters."""

    groups: NanochatGroups
    arrays: dict[str, Any]  # as `optim.groups.state_arrays` names them; float32, and the counts of steps int32


def group_paths(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its parameters, both in nanochat's order where `paths` is; only groups that have a parameter."""
    members = {name: [path for path in paths if re.fullmatch(pattern, path)] for pattern, name in GROUP_OF}
    return {name: paths for name, paths in members.items() if paths}


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
    """The groups as a list that JSON can hold; `groups_from_json` makes them again."""
    return [{"name": name, **group._asdict()} for name, group in groups.items()]


def groups_from_json(stored: list[dict]) -> NanochatGroups:
    """The inverse of `groups_to_json`."""
    groups = {}
    for fields in map(dict, stored):
        name = fields.pop("name")
        if fields["kind"] == "muon":
            groups[name] = MuonGroup(**fields)
        else:
            groups[name] = AdamWGroup(**fields | {"betas": tuple(fields["betas"])})  # JSON has lists
    return groups
