"""Muon (Keller Jordan, 2024) as an optax transform, as nanochat has it: rows are equalised, the iteration has Polar
Express coefficients (arXiv 2505.16932), the second moment is NorMuon's factored one (arXiv 2510.05491), and weights
decay cautiously. `optax.contrib.muon` has none of these.

A matrix must be whole to be orthogonalised: `orthogonalize_distributed` brings each to one device and its parts back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.collectives import spec_in_force
from nanochat_jax.distributed.mesh import platform
from nanochat_jax.distributed.sharding import path_name

POLAR_EXPRESS = (  # (a, b, c) of X <- aX + (bA + cA^2)X, A = X X^T, for singular values up to 1/1.01 after scaling
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    """Trees shaped like the matrices [r,c], in their type."""

    momentum: Any  # as the parameter [r,c]
    second: Any  # [r,1] where r >= c, else [1,c]


def scale_by_muon(b2: float, compute_dtype=jnp.float32) -> optax.GradientTransformationExtraArgs:
    """Orthogonalised momentum of matrices (out, in), with variance reduction along the long side.

    Matrices of one shape are orthogonalised together; with a mesh in force each device takes whole ones.
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
            alike.setdefault((leaf.shape, spec_in_force(path_name(path), leaf.shape)), []).append(i)
        for (_, home), members in alike.items():
            U, second = ([tree[i] for i in members] for tree in (leaves, seconds))
            X, second = orthogonalize_distributed(
                partial(orthogonalised, b2), [u.astype(compute_dtype) for u in U], second, home
            )
            for row, i in enumerate(members):
                leaves[i], seconds[i] = X[row], second[row]
        return treedef.unflatten(leaves), MuonState(momentum, treedef.unflatten(seconds))

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalize_distributed(
    work: Callable, U: list[jax.Array], second: list[jax.Array], home: P
) -> tuple[Any, jax.Array]:
    """work(U [K,r,c], second [K,...]) -> (X, second) of those shapes, for matrices that are each cut up over the mesh
    in force as `home` says. Every device gets whole matrices, as many as any other, and gives them back in parts:
    two exchanges of what it holds, and nobody ever holds all of them. -> X as K matrices cut up as they were."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return work(jnp.stack(U), jnp.stack(second))
    side = {name: axis for axis, name in enumerate(home, 1) if name}  # of the stack
    names = [*side, *(name for name, n in mesh.shape.items() if n > 1 and name not in side)]  # the last hold copies

    def own(x, name):
        size = len(x) // mesh.shape[name]
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * size, size)

    def local(U, second):
        X, second = (jnp.pad(x, [(0, -len(x) % mesh.size), (0, 0), (0, 0)]) for x in (jnp.stack(U), second))
        for name in names:
            X = jax.lax.all_to_all(X, name, 0, side[name], tiled=True) if name in side else own(X, name)
            second = own(second, name)
        X, second = work(X, second)
        for name in reversed(names):
            back = partial(jax.lax.all_gather, axis_name=name, tiled=True)
            X = jax.lax.all_to_all(X, name, side[name], 0, tiled=True) if name in side else back(X)
            second = back(second)
        return [X[i] for i in range(len(U))], second[: len(U)]

    matrices = [home] * len(U)
    return jax.shard_map(local, in_specs=(matrices, P()), out_specs=(matrices, P()), check_vma=False)(
        U, jnp.stack(second)
    )


def orthogonalised(b2: float, U: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U [K,r,c] and its second moment -> (the update's direction, float32 [K,r,c], the new second moment)."""
    if platform() == "cpu":  # XLA on CPU multiplies single matrices 1.4 times as fast as batches
        X = jax.lax.map(orthogonalise, U)
    else:
        X = orthogonalise(U)
    return reduce_variance(X, second, b2)


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
