"""nanochat's optimizer as optax transforms: AdamW for embeddings, head and scalars, Muon for the matrices in blocks.

Groups differ in learning rate, betas and decay. What changes from step to step (the rate's multiplier, Muon's momentum,
in pretraining its weight decay) is an argument of `update`, computed from the step by the schedules below: there is no
schedule state to restore.
`optax.contrib.muon` is another optimizer: this one equalises rows, iterates with Polar Express coefficients
(arXiv 2505.16932), keeps NorMuon's factored second moment (arXiv 2510.05491) and decays weights cautiously.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from nanochat_jax.sharding import by_path, data_shards, fit, param_spec, path_name, platform

POLAR_EXPRESS = (  # (a, b, c) of X <- aX + (bA + cA^2)X, A = X X^T, for singular values up to 1/1.01 after scaling
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

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
    """A group under Muon (Keller Jordan, 2024) as described above; b2 is the decay of the second moment."""

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
    return by_path(params, GROUP_OF)


def decay_and_rate(weight_decay: float, lr: float) -> optax.GradientTransformationExtraArgs:
    """AdamW's end: p <- p (1 - rate wd) - rate u, rounded in this order, as in nanochat; rate = lr * lr_multiplier."""

    def update(updates, state, params, *, lr_multiplier, **_):
        rate = lr * lr_multiplier
        return jax.tree.map(lambda u, p: (p * (1 - rate * weight_decay) - rate * u) - p, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class MuonState(NamedTuple):
    """Trees shaped like the matrices [r,c], in their type."""

    momentum: Any  # as the parameter [r,c]
    second: Any  # [r,1] where r >= c, else [1,c]


def scale_by_muon(b2: float, compute_dtype=jnp.float32) -> optax.GradientTransformationExtraArgs:
    """Orthogonalised momentum of matrices (out, in), with variance reduction along the long side.

    Matrices of one shape are orthogonalised together; with a mesh in force they are spread over the data axis.
    """

    def init(params):
        def second(p):
            r, c = p.shape
            return jnp.zeros((r, 1) if r >= c else (1, c), p.dtype)

        return MuonState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(second, params))

    def update(updates, state, params=None, *, muon_momentum, **_):
        mu = muon_momentum
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: (1 - mu) * g + mu * m, momentum, updates)
        leaves, treedef = jax.tree.flatten(nesterov)
        seconds = treedef.flatten_up_to(state.second)
        alike: dict[tuple, list[int]] = {}  # of one shape, and cut up between devices in one way
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(nesterov)):
            alike.setdefault((leaf.shape, layout(path_name(path), leaf.shape)), []).append(i)
        for (_, home), members in alike.items():
            U, second = (spread(jnp.stack([tree[i] for i in members])) for tree in (leaves, seconds))
            X, second = reduce_variance(orthogonalise_all(U, compute_dtype), second, b2)
            X, second = brought_home(X, home), brought_home(second, home)
            for row, i in enumerate(members):
                leaves[i], seconds[i] = X[row], second[row]
        return treedef.unflatten(leaves), MuonState(momentum, treedef.unflatten(seconds))

    return optax.GradientTransformationExtraArgs(init, update)


def spread(stack: jax.Array) -> jax.Array:
    """A stack [K,...] with whole matrices on each device of the data axis, filled up with zeros to a multiple of it.

    Without a mesh in force as it is; likewise in the two functions below."""
    shards = data_shards()
    if shards == 1:
        return stack
    stack = jnp.pad(stack, [(0, -len(stack) % shards), *[(0, 0)] * (stack.ndim - 1)])
    return jax.lax.with_sharding_constraint(stack, P("data", *[None] * (stack.ndim - 1)))


def layout(path: str, shape: tuple[int, ...]) -> P | None:
    """How the table in `sharding` cuts this matrix up on the mesh in force; None without one."""
    return fit(param_spec(path), shape, jax.sharding.get_abstract_mesh()).spec if data_shards() > 1 else None


def brought_home(stack: jax.Array, home: P | None) -> jax.Array:
    """A spread stack with each matrix cut up as its parameter is: devices exchange parts, none ever holds them all."""
    if home is None:
        return stack
    home = P(*(axis if size > 1 else None for axis, size in zip(home, stack.shape[1:])))  # a factored moment's ones
    return jax.lax.with_sharding_constraint(stack, P(None, *home))


def orthogonalise_all(U: jax.Array, compute_dtype=jnp.float32) -> jax.Array:
    """Orthogonalise a stack [K,r,c] -> float32 [K,r,c]."""
    if data_shards() == 1 and platform() == "cpu":  # XLA on CPU multiplies single matrices 1.4 times as fast as batches
        return jax.lax.map(lambda u: orthogonalise(u, compute_dtype), U)
    return orthogonalise(U, compute_dtype)


def orthogonalise(u: jax.Array, compute_dtype=jnp.float32) -> jax.Array:
    """[...,r,c] -> float32 [...,r,c], singular values near 1 and Frobenius norm sqrt(min(r,c)).

    A matrix of zeros stays zero.
    """
    r, c = u.shape[-2:]
    u = u.astype(compute_dtype)
    rows = jnp.linalg.norm(u, axis=-1, keepdims=True)
    u = u * ((_norm(u) / r**0.5) / jnp.maximum(rows, 1e-6)).astype(u.dtype)  # equal rows (MuonEq)
    X = u / (1.01 * _norm(u) + 1e-6)
    for a, b, c3 in POLAR_EXPRESS:
        if r > c:
            A = X.mT @ X
            X = a * X + X @ (b * A + c3 * (A @ A))
        else:
            A = X @ X.mT
            X = a * X + (b * A + c3 * (A @ A)) @ X
    X = X.astype(jnp.float32)
    return X * (min(r, c) ** 0.5 / jnp.maximum(_norm(X), 1e-6))


def _norm(x):
    """Frobenius norm of each matrix, [...,1,1]."""
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


def reduce_variance(X: jax.Array, second: jax.Array, b2: float) -> tuple[jax.Array, jax.Array]:
    """NorMuon: divide by a running root mean square per row (per column where r < c); the Frobenius norm is kept.

    X [K,r,c], second [K,r,1] or [K,1,c] -> the same shapes."""
    axis = -1 if X.shape[-2] >= X.shape[-1] else -2
    q = jnp.mean(X * X, axis, keepdims=True)
    second = b2 * second + (1 - b2) * q
    f = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    n = X.shape[axis]
    before = jnp.sqrt(n * jnp.sum(q, (-2, -1), keepdims=True))
    after = jnp.sqrt(n * jnp.sum(q * f * f, (-2, -1), keepdims=True))
    return X * (f * (before / jnp.maximum(after, 1e-10))), second


def muon_decay_and_rate(weight_decay: float, lr: float) -> optax.GradientTransformationExtraArgs:
    """-L (X + wd p) with L = lr * multiplier * sqrt(max(1, r / c)); wd = weight_decay * decay_multiplier, but only
    where X and p agree in sign (cautious)."""

    def update(updates, state, params, *, lr_multiplier, decay_multiplier=1.0, **_):
        def one(X, p):
            L = lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * lr_multiplier
            return -L * jnp.where(X * p >= 0, X + weight_decay * decay_multiplier * p, X)

        return jax.tree.map(one, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def sft_lr_multiplier(progress: float, *, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> float:
    """nanochat's trapezoid over progress p, which is not clipped: above 1 the multiplier goes on falling."""
    if progress < warmup_ratio:
        return (progress + 1e-8) / warmup_ratio
    if progress <= 1.0 - warmdown_ratio:
        return 1.0
    decay = (progress - (1.0 - warmdown_ratio)) / warmdown_ratio
    return (1 - decay) + decay * final_lr_frac


def sft_muon_momentum(step: int) -> float:
    """From 0.85 to 0.95 over the first 300 steps."""
    warm = min(step / 300, 1)
    return (1 - warm) * 0.85 + warm * 0.95


def base_lr_multiplier(
    step: int, total: int, *, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float
) -> float:
    """Pretraining (nanochat, 2026): linearly up over warmup_steps, then 1, then linearly down to final_lr_frac, which
    step `total` would have, over the last warmdown_ratio of the run."""
    warmdown = round(warmdown_ratio * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= total - warmdown:
        return 1.0
    left = (total - step) / warmdown
    return left + (1 - left) * final_lr_frac


def base_muon_momentum(step: int, total: int, *, warmdown_ratio: float) -> float:
    """Pretraining (nanochat, 2026): from 0.85 to 0.97 over the first 400 steps, to 0.90 while the rates go down."""
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    warmdown = round(warmdown_ratio * total)
    done = (step - (total - warmdown)) / warmdown if step >= total - warmdown else 0.0
    return 0.97 + (0.90 - 0.97) * done


def base_decay_multiplier(step: int, total: int) -> float:
    """Pretraining (nanochat, 2026): of Muon's weight decay, half a cosine from 1 to 0 at step `total`."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


def rl_lr_multiplier(step: int, num_steps: int) -> float:
    """From 1 linearly to 0 at num_steps."""
    return 1.0 - step / num_steps


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
