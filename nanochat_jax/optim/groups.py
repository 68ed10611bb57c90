"""nanochat's optimizer as optax transforms: AdamW for embeddings, head and scalars, Muon for the matrices in blocks.

Groups of parameters differ in learning rate, betas and weight decay. What changes from step to step (the factor on the
rates, Muon's momentum, the factor on its decay) are keywords of `update` that a stage computes by optim/schedules.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.distributed.sharding import map_by_path, path_name
from nanochat_jax.optim.muon import muon_step, scale_by_muon

GROUP_OF = [  # parameter path -> group
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
    """Settings of a group under AdamW (arXiv 1711.05101); lr is the rate where lr_multiplier is 1."""

    lr: float
    b1: float
    b2: float
    weight_decay: float
    eps: float = 1e-10


@dataclasses.dataclass(frozen=True)
class Muon:
    """Settings of a group under Muon (optim/muon.py); b2 is the decay of the second moment."""

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
    """nanochat's groups and betas. The rates of embeddings and head are given for width 768 and scale as width^-1/2;
    `weight_decay` is that of the matrices."""
    s = (n_embd / 768) ** -0.5
    return {  # lr, b1, b2, weight_decay
        "unembedding": AdamW(unembedding_lr * s, 0.8, 0.96, 0.01),
        "embedding": AdamW(embedding_lr * s, 0.8, 0.995, 0.001),
        "value_embedding": AdamW(embedding_lr * s * 0.5, 0.8, 0.995, 0.01),
        "resid": AdamW(scalar_lr * 0.01, 0.8, 0.95, 0.05),
        "x0": AdamW(scalar_lr, 0.96, 0.95, 0.0),
        "smear": AdamW(0.2, 0.8, 0.95, 0.0),
        "matrix": Muon(matrix_lr, weight_decay),
    }


def groups_in_use(groups: Groups, params: Any) -> Groups:
    """The groups that have a parameter in this model: older eras of nanochat have no smear, lambdas or value
    embeddings."""
    used = set(jax.tree.leaves(group_labels(params)))
    return {name: group for name, group in groups.items() if name in used}


def scale_rates(groups: Groups, factor: float) -> Groups:
    """Every group with its learning rate times `factor` (nanochat's --init-lr-frac)."""
    return {name: dataclasses.replace(group, lr=group.lr * factor) for name, group in groups.items()}


def groups_from_meta(recorded: Mapping[str, Mapping]) -> Groups:
    """The groups that a checkpoint's meta records as `optimizer_groups`: group -> fields of AdamW or Muon."""
    return {name: (AdamW if "b1" in fields else Muon)(**fields) for name, fields in recorded.items()}


def update_all_but_rates(groups: Groups, recorded: Mapping[str, Mapping]) -> Groups:
    """The groups with the recorded betas, eps and decay (as for `groups_from_meta`), and with their own rates."""
    return {
        name: dataclasses.replace(group, **{**recorded.get(name, {}), "lr": group.lr}) for name, group in groups.items()
    }


def make_optimizer(groups: Groups, compute_dtype=jnp.float32) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the whole parameter tree. `update` must be given lr_multiplier and muon_momentum, may be given
    decay_multiplier (Muon's weight decay, default 1), and ignores keywords that no transform reads.

    compute_dtype: the type in which Muon's matrices are exchanged and orthogonalized.
    """

    def transform(group):
        if isinstance(group, Muon):
            return optax.chain(scale_by_muon(group.b2, compute_dtype), muon_step(group.weight_decay, group.lr))
        # float32 betas, because 1 - beta must be the same number in the moment and in its bias correction
        adam = optax.scale_by_adam(np.float32(group.b1), np.float32(group.b2), group.eps)
        return optax.chain(adam, adamw_step(group.weight_decay, group.lr))

    return optax.partition({name: transform(group) for name, group in groups.items()}, group_labels)


def group_labels(params: Any) -> Any:
    """The tree with each parameter's group in its place; the ValueError names a parameter that has none."""
    return map_by_path(params, GROUP_OF)


def adamw_step(weight_decay: float, lr: float) -> optax.GradientTransformationExtraArgs:
    """Direction u -> change of the parameter p, which becomes p (1 - rate weight_decay) - rate u, rounded in nanochat's
    order; rate = lr * lr_multiplier, a keyword of `update`."""

    def update(updates, state, params, *, lr_multiplier, **_):
        rate = lr * lr_multiplier
        return jax.tree.map(lambda u, p: (p * (1 - rate * weight_decay) - rate * u) - p, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def state_arrays(opt_state: Any) -> dict[str, Any]:
    """The optimizer's state by its names in a checkpoint: "exp_avg/<path>", "exp_avg_sq/<path>" and the number of steps
    "count/<group>", int32, of AdamW; "momentum/<path>" and "second_momentum/<path>" of Muon."""
    return {_array_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)}


def with_state_arrays(opt_state: Any, arrays: Mapping[str, Any]) -> Any:
    """`opt_state` with the arrays of a `state_arrays` dict in place of its own; a missing one is a KeyError."""
    return jax.tree.map_with_path(lambda path, _: arrays[_array_name(path)], opt_state)


def _array_name(path: tuple) -> str:
    """A path in optax's state, (inner_states, group, inner_state, 0, field, *parameter), as a name in a checkpoint."""
    group, field = path[1].key, path[4].name
    kind = {"mu": "exp_avg", "nu": "exp_avg_sq"}.get(field, field)  # optax's names of Adam's moments
    return f"{kind}/{group if kind == 'count' else path_name(path[5:])}"
