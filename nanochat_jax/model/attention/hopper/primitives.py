"""What the Hopper kernels of flash attention share: sizes, the ring of shared memory, masks, products.

Two things differ where a kernel is interpreted, because the interpreter lacks them: a product's left operand cannot
come from registers (`left_operand` puts it into shared memory), and an accumulator cannot start from a value
(`accumulate` adds afterwards). All else is the program that runs on a GPU, warpgroups and barriers included.
"""

import math
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS = 2  # that compute; one more copies
ROWS = 64  # of a wgmma: what one warpgroup owns of the program's block
BLOCK = WARPGROUPS * ROWS
SHARED_MEMORY = 227 * 1024  # bytes that a program can have at compute capability 9.0
REDUCTION_SCRATCH = 2048  # bytes of it that Pallas keeps for itself
ALIGNMENT = 1024  # bytes, of every buffer
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # per thread; 2 x 232 + 40 = 504, the 3 x 168 a program starts with

WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


class Blocks(NamedTuple):
    """What a kernel walks over, keys for the output and dq, queries for dk and dv: the size of a block and how many of
    them its ring of shared memory holds."""

    step: int
    stages: int


# By head size H. Registers of a thread (64 x 128 float32 are 64 of them), of 232: the output needs H / 2 for itself,
# 64 for scores of 128 keys, 32 for bf16 probabilities; dq H / 2, then step / 2 each for scores and their gradient; dk
# and dv H, step / 2 twice, step / 4 for bf16 probabilities and as much for each of lse, delta and k_start in turn.
# Chosen by this count, not timed.
FORWARD = {64: Blocks(128, 2), 128: Blocks(128, 2)}
DQ = {64: Blocks(128, 2), 128: Blocks(64, 4)}
DKV = {64: Blocks(64, 4), 128: Blocks(64, 4)}


def hopper_kernel(body, out_type, grid, memory, staged, interpret):
    """A kernel of three warpgroups over `grid` (name -> size, the last one fastest). `memory` is its shared memory and
    barriers by name, `staged` what it needs in addition where it is interpreted."""
    used = REDUCTION_SCRATCH + sum(map(_bytes, memory.values()))
    if used > SHARED_MEMORY:
        raise ValueError(f"a kernel's blocks must fit into {SHARED_MEMORY} bytes of shared memory, got {used}")
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=memory | staged if interpret else memory,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_SCRATCH),
        interpret=interpret,
    )


def tiled(*shape, dtype):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _bytes(memory):
    if isinstance(memory, plgpu.Barrier):
        return 8 * int(np.prod(memory.num_barriers))
    x = memory.inner_aval
    return -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // ALIGNMENT) * ALIGNMENT


def rows(i, w):
    """What warpgroup w owns of block i."""
    return pl.ds(i * BLOCK + w * ROWS, ROWS)


def feed(count, stages, copies, ready, free):
    """Fill the next slot of each ring, once it is free, from (source, ring) pairs; `count` slots were filled before."""
    slot = lax.rem(count, stages)
    pl.when(count >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
    for source, ring in copies:
        plgpu.copy_gmem_to_smem(source, ring.at[slot], ready.at[slot])


def walk(visited, visit, carry):
    """Fold visit(block, carry, masked) over the blocks of one program's `attention.blocks.Ranges`."""
    first, full_first, full_last, last = visited
    carry = lax.fori_loop(first, full_first, partial(visit, masked=True), carry)
    carry = lax.fori_loop(full_first, full_last, partial(visit, masked=False), carry)
    return lax.fori_loop(full_last, last, partial(visit, masked=True), carry)


def iota(like, axis, offset):
    return plgpu.broadcasted_iota(jnp.int32, like.shape, axis, layout=WGMMA) + offset


def mask(s, query, key, start):
    return jnp.where((key <= query) & (key >= start), s, -jnp.inf)


def full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def per_row(x, columns):
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def per_column(x, rows):
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def left_operand(x, stage, w):
    """x as the left operand of a wgmma: itself, in registers, or a copy in shared memory where `stage` is given."""
    if stage is None:
        return x
    stage[w] = x
    plgpu.commit_smem()
    return stage.at[w]


def accumulate(acc, a, b, interpret):
    """acc + a @ b."""
    if not interpret:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))

    def product(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
