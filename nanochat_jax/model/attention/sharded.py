"""Kernels under a mesh: XLA's partitioner cannot split one, so every device runs it on its own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.mesh import row_axes, row_shards


def sharded(kernel: Callable) -> Callable:
    """kernel(q, k, v, k_start, scale, window) of one device -> the same function under the mesh in force.

    Rows are split over `row_axes` and heads over model, each kv head with its query heads. What an axis does not divide
    (the single prompt, fewer kv heads than devices) every device of that axis computes whole. Without a mesh, and in a
    shard_map that has entered an empty one, the kernel is called as it is.
    """

    def attend(q, k, v, k_start, scale, window):
        mesh = jax.sharding.get_abstract_mesh()
        if all(size == 1 for size in mesh.shape.values()):
            return kernel(q, k, v, k_start, scale, window)
        rows = None if q.shape[0] % row_shards() else row_axes()
        heads = None if k.shape[2] % mesh.shape["model"] else "model"
        each = P(rows, None, heads, None)
        return jax.shard_map(
            lambda *arrays: kernel(*arrays, scale, window),
            in_specs=(each, each, each, P(rows, None)),
            out_specs=each,
            check_vma=False,
        )(q, k, v, k_start)

    return attend
