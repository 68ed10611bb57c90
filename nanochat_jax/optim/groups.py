"""nanochat's optimizer as optax transforms: AdamW for embeddings, head and scalars, Muon for the matrices in blocks.

Groups differ in learning rate, betas and decay. What changes from step to step (the rate's multiplier, Muon's momentum,
in pretraining its weight decay) is an argument of `update`, computed from the step by the schedules below: there is no
schedule state to restore.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.distributed.sharding import map_by_path, path_name
from nanochat_jax.optim.muon import MuonState, muon_decay_and_rate, scale_by_muon

GROUP_OF = [  # parameter path -> learning-rate group
    (r"lm_head", "unembedding"),
    (r"wte", "embedding"),
    (r".*/value_embed", "value_embedding"),
    (r"resid_lambdas", "resid"),
    (r"x0_lambdas", "x0"),
    (r"smear_gate|smear_lambda|backout_lambda", "smear"),
    (r"blocks/.*/(c_q|c_k|c_v|c_proj|c_fc|ve_gate)", "matrix"),
]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """A group under AdamW (arXiv 1711.05101). lr is the rate at multiplier 1; decay is lr * weight_decay a step."""

    lr: float
    b1: float
    b2: float
    weight_decay: float
    eps: float = 1e-10


@dataclasses.dataclass(frozen=True)
class Muon:
    """A group under Muon (see `muon`); b2 is the decay of the second moment."""

    lr: float
    weight_decay: float
    b2: float = 0.9


Groups = dict[str, AdamW | Muon]


def default_groups(
    n_embd: int,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.0,
) -> Groups:
    """nanochat's groups. Rates of embeddings and head are given for width 768 and scale as width^-1/2; `weight_decay`
    reaches the matrices only."""
    s = (n_embd / 768) ** -0.5
    return {
        "unembedding": AdamW(unembedding_lr * s, 0.8, 0.96, 0.01),
        "embedding": AdamW(embedding_lr * s, 0.8, 0.995, 0.001),
        "value_embedding": AdamW(embedding_lr * s * 0.5, 0.8, 0.995, 0.01),
        "resid": AdamW(scalar_lr * 0.01, 0.8, 0.95, 0.05),
        "x0": AdamW(scalar_lr, 0.96, 0.95, 0.0),
        "smear": AdamW(0.2, 0.8, 0.95, 0.0),
        "matrix": Muon(matrix_lr, weight_decay),
    }


def groups_in_use(groups: Groups, params: Any) -> Groups:
    """Those that the model has a parameter of: nanochat's older eras have no smear, no lambdas, no value embeddings."""
    used = set(jax.tree.leaves(group_labels(params)))
    return {name: group for name, group in groups.items() if name in used}


def scale_rates(groups: Groups, factor: float) -> Groups:
    """Every group with its rate times `factor` (nanochat's --init-lr-frac)."""
    return {name: dataclasses.replace(group, lr=group.lr * factor) for name, group in groups.items()}


def make_optimizer(groups: Groups, compute_dtype=jnp.float32) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer over the parameter tree. `update` needs the keywords lr_multiplier and muon_momentum, and
    takes decay_multiplier (default 1), a factor on Muon's weight decay.

    compute_dtype: the type in which Muon orthogonalises (bfloat16 on accelerators, as in nanochat).
    """

    def transform(group):
        if isinstance(group, Muon):
            return optax.chain(
                scale_by_muon(group.b2, compute_dtype), muon_decay_and_rate(group.weight_decay, group.lr)
            )
        # float32 betas, because 1 - beta must be the same number in the moment and in its bias correction
        b1, b2 = np.float32(group.b1), np.float32(group.b2)
        return optax.chain(
            optax.scale_by_adam(b1, b2, group.eps),
            decay_and_rate(group.weight_decay, group.lr),
        )

    return optax.partition({name: transform(group) for name, group in groups.items()}, group_labels)


def group_labels(params: Any) -> Any:
    """The tree with each parameter's group name in its place; ValueError names a parameter without a group."""
    return map_by_path(params, GROUP_OF)


def decay_and_rate(weight_decay: float, lr: float) -> optax.GradientTransformationExtraArgs:
    """AdamW's end: p <- p (1 - rate wd) - rate u, rounded in this order, as in nanochat; rate = lr * lr_multiplier."""

    def update(updates, state, params, *, lr_multiplier, **_):
        rate = lr * lr_multiplier
        return jax.tree.map(lambda u, p: (p * (1 - rate * weight_decay) - rate * u) - p, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def state_arrays(opt_state: Any) -> dict[str, Any]:
    """The optimizer's state as a flat dict, whatever optax wraps around it: "exp_avg/<path>", "exp_avg_sq/<path>",
    "momentum/<path>", "second_momentum/<path>" with arrays as `scale_by_*` keep them, "count/<group>" int32."""
    arrays = {}
    for group, masked in opt_state.inner_states.items():
        inner = masked.inner_state[0]
        if isinstance(inner, optax.ScaleByAdamState):
            arrays[f"count/{group}"] = inner.count
            kinds = {"exp_avg": inner.mu, "exp_avg_sq": inner.nu}
        else:
            kinds = {"momentum": inner.momentum, "second_momentum": inner.second}
        for kind, tree in kinds.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                arrays[f"{kind}/{path_name(path)}"] = leaf
    return arrays


def with_state_arrays(opt_state: Any, arrays: dict[str, Any]) -> Any:
    """`opt_state` with its arrays replaced by those of a `state_arrays` dict; a missing one is a KeyError."""

    def fill(kind, tree):
        return jax.tree.map_with_path(lambda path, _: arrays[f"{kind}/{path_name(path)}"], tree)

    inner_states = {}
    for group, masked in opt_state.inner_states.items():
        inner, *rest = masked.inner_state
        if isinstance(inner, optax.ScaleByAdamState):
            moments = {"mu": fill("exp_avg", inner.mu), "nu": fill("exp_avg_sq", inner.nu)}
            inner = inner._replace(count=arrays[f"count/{group}"], **moments)
        else:
            inner = MuonState(fill("momentum", inner.momentum), fill("second_momentum", inner.second))
        inner_states[group] = masked._replace(inner_state=(inner, *rest))
    return opt_state._replace(inner_states=inner_states)


def replace_groups(groups: Groups, recorded: Mapping[str, Mapping]) -> Groups:
    """Each group with the recorded values, the learning rate left as it is."""
    return {
        name: dataclasses.replace(group, **{k: v for k, v in recorded.get(name, {}).items() if k != "lr"})
        for name, group in groups.items()
    }


def groups_from(recorded: Mapping[str, Mapping]) -> Groups:
    """Groups from the `optimizer_groups` of a checkpoint's meta, rates included."""
    return {name: (AdamW if "b1" in fields else Muon)(**fields) for name, fields in recorded.items()}
