"""Muon (Keller Jordan, 2024) as an optax transform, with nanochat's four changes, which `optax.contrib.muon` lacks.

Rows are scaled to one norm before the iteration; the iteration has the coefficients of Polar Express (arXiv
2505.16932); the second moment is NorMuon's, one number a row or column (arXiv 2510.05491); and weight decay is
cautious, that is, it spares weights that the update makes larger. All of this needs the whole of a matrix (out, in):
where a mesh splits it, `orthogonalize_distributed` brings it to one device and its parts back.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.collectives import spec_in_force
from nanochat_jax.distributed.sharding import path_name

# (a, b, c) of each iteration X <- a X + (b A + c A^2) X, A = X X^T, for singular values of at most 1 / 1.01.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    """What Muon remembers of each matrix, as trees like the parameters, float32."""

    momentum: Any  # [r,c], running mean of the gradients
    second_momentum: Any  # [r,1] where r >= c, else [1,c]: running mean square of the orthogonalized rows or columns


def scale_by_muon(b2: float, compute_dtype=jnp.float32) -> optax.GradientTransformationExtraArgs:
    """Gradients of matrices (out, in) -> orthogonalized Nesterov momentum, float32. `update` reads muon_momentum.

    b2 is the decay of the second moment, compute_dtype the type in which the devices exchange and orthogonalize the
    momentum. Matrices of one shape are one stack; with a mesh in force each device takes whole ones.
    """

    def init(params):
        def second_momentum(p):
            r, c = p.shape
            return jnp.zeros((r, 1) if r >= c else (1, c), p.dtype)

        return MuonState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(second_momentum, params))

    def update(updates, state, params=None, *, muon_momentum, **_):
        mu = muon_momentum
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: (1 - mu) * g + mu * m, momentum, updates)
        leaves, treedef = jax.tree.flatten(nesterov)
        seconds = treedef.flatten_up_to(state.second_momentum)
        stacks: dict[tuple, list[int]] = {}  # matrices of one shape that the mesh splits in one way
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(nesterov)):
            stacks.setdefault((leaf.shape, spec_in_force(path_name(path), leaf.shape)), []).append(i)
        for (_, spec), members in stacks.items():
            matrices = [leaves[i].astype(compute_dtype) for i in members]
            X, second = orthogonalize_distributed(matrices, [seconds[i] for i in members], spec, b2)
            for row, i in enumerate(members):
                leaves[i], seconds[i] = X[row], second[row]
        return treedef.unflatten(leaves), MuonState(momentum, treedef.unflatten(seconds))

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalize_distributed(
    U: list[jax.Array], second: list[jax.Array], spec: P, b2: float
) -> tuple[jax.Array | list[jax.Array], jax.Array]:
    """Directions of the update for matrices U [r,c] that the mesh in force splits as `spec`, the work divided evenly.

    Each device sends its parts away and receives as many whole matrices as any other (all-to-all), works on them, and
    a second exchange brings the parts back: no device ever holds all of them. Devices that hold copies of a part take
    a slice each of what they have and gather the results. `second` [r,1] or [1,c] is whole on every device.
    -> (directions float32 [r,c], split as the matrices were, second moments as one stack).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        # XLA for GPUs would compile the stacking and the taking apart, a branch a matrix, into every kernel that reads
        # the stack: half of the seconds in which the optimizer of depth 12 compiles.
        X, second = jax.lax.optimization_barrier((jnp.stack(U), jnp.stack(second)))
        return jax.lax.optimization_barrier(reduce_variance(orthogonalize(X), second, b2))
    split = {name: axis for axis, name in enumerate(spec, 1) if name}  # mesh axis -> axis of the stack [n,r,c]
    mesh_axes = [*split, *(name for name, size in mesh.shape.items() if size > 1 and name not in split)]

    def own_slice(x, name):
        size = len(x) // mesh.shape[name]
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * size, size)

    def local(U, second):
        X, second = (jnp.pad(x, [(0, -len(x) % mesh.size), (0, 0), (0, 0)]) for x in (jnp.stack(U), second))
        for name in mesh_axes:
            X = jax.lax.all_to_all(X, name, 0, split[name], tiled=True) if name in split else own_slice(X, name)
            second = own_slice(second, name)
        X, second = reduce_variance(orthogonalize(X), second, b2)
        for name in reversed(mesh_axes):
            gather = partial(jax.lax.all_gather, axis_name=name, tiled=True)
            X = jax.lax.all_to_all(X, name, split[name], 0, tiled=True) if name in split else gather(X)
            second = gather(second)
        return [X[i] for i in range(len(U))], second[: len(U)]

    specs = [spec] * len(U), P()
    return jax.shard_map(local, in_specs=specs, out_specs=specs, check_vma=False)(U, jnp.stack(second))


def orthogonalize(U: jax.Array) -> jax.Array:
    """[...,r,c] -> float32 [...,r,c] with singular values near 1 and Frobenius norm sqrt(min(r, c)).

    The iteration runs in U's dtype, as nanochat's does in bfloat16. A matrix of zeros stays zero."""
    r, c = U.shape[-2:]
    rows = jnp.linalg.norm(U, axis=-1, keepdims=True)
    U = U * ((frobenius_norm(U) / r**0.5) / jnp.maximum(rows, 1e-6)).astype(U.dtype)
    X = U / (1.01 * frobenius_norm(U) + 1e-6)
    X = X.mT if r > c else X  # the smaller of the two square matrices, and products that need no transposed copy

    def iterate(X, coefficients):
        a, b, c = coefficients
        A = jnp.einsum("...rc,...sc->...rs", X, X)  # XLA on CPU computes X @ X.mT of bfloat16 in float32
        return a * X + (b * A + c * (A @ A)) @ X, None

    X, _ = jax.lax.scan(iterate, X, jnp.asarray(POLAR_EXPRESS, X.dtype))  # a loop: compiled once, not five times
    X = X.mT if r > c else X
    X = X.astype(jnp.float32)
    return X * (min(r, c) ** 0.5 / jnp.maximum(frobenius_norm(X), 1e-6))


def frobenius_norm(X: jax.Array) -> jax.Array:
    """[...,r,c] -> [...,1,1]"""
    return jnp.linalg.norm(X, axis=(-2, -1), keepdims=True)


def reduce_variance(X: jax.Array, second: jax.Array, b2: float) -> tuple[jax.Array, jax.Array]:
    """NorMuon: divide each row (each column where r < c) by its running root mean square; the Frobenius norm is kept.

    X [n,r,c], second [n,r,1] or [n,1,c] -> (X, second), same shapes."""
    axis = -1 if X.shape[-2] >= X.shape[-1] else -2
    mean_square = jnp.mean(X * X, axis, keepdims=True)
    second = b2 * second + (1 - b2) * mean_square
    scale = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    n = X.shape[axis]
    before = jnp.sqrt(n * jnp.sum(mean_square, (-2, -1), keepdims=True))
    after = jnp.sqrt(n * jnp.sum(mean_square * scale * scale, (-2, -1), keepdims=True))
    return X * (scale * (before / jnp.maximum(after, 1e-10))), second


def muon_step(weight_decay: float, lr: float) -> optax.GradientTransformationExtraArgs:
    """Direction X -> change of the parameter p: -rate (X + decay p), without the decay where X and p differ in sign.

    rate = lr * lr_multiplier * sqrt(max(1, r / c)), decay = weight_decay * decay_multiplier, both keywords of `update`.
    """

    def update(updates, state, params, *, lr_multiplier, decay_multiplier=1.0, **_):
        def change(X, p):
            rate = lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * lr_multiplier
            return -rate * jnp.where(X * p >= 0, X + weight_decay * decay_multiplier * p, X)

        return jax.tree.map(change, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
