"""What the three Hopper kernels of flash attention share: sizes, the ring of shared memory, masks.

A program is two warpgroups: its 256 threads can have 255 registers each by themselves. With a third one that copies
they could not, unless registers are handed over (setmaxnreg), which the compiler ignores in relocatable code, and
spills. That is the code that JAX asks for wherever it finds nvJitLink, as in NVIDIA's wheels.

Two things differ where a kernel is interpreted, because the interpreter lacks them: a product's left operand cannot
come from registers (`left_operand` puts it into shared memory), and an accumulator cannot start from a value
(`accumulate` adds afterwards). All else is the program that runs on a GPU, warpgroups and barriers included.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS = 2  # of a program
ROWS = 64  # of the output that a warpgroup computes: the rows of a wgmma
BLOCK = WARPGROUPS * ROWS  # queries (for dk and dv: keys) of a program
SHARED_MEMORY = 227 * 1024  # bytes that a program can have at compute capability 9.0
REDUCTION_SCRATCH = 2048  # bytes of it that Pallas keeps for itself
ALIGNMENT = 1024  # bytes that every buffer is rounded up to

WGMMA = plgpu.Layout.WGMMA  # of a matrix in registers
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)  # of a vector with one entry a row or column of such a matrix


class Blocks(NamedTuple):
    """The blocks that a kernel walks over: of keys for the output and dq, of queries for dk and dv."""

    step: int  # keys or queries of a block
    stages: int  # blocks that its ring of shared memory holds


# By head size H, chosen by counting registers, not timed. A thread has 255; a float32 matrix of a warpgroup, 64 x n,
# takes n / 2 of each thread. The output needs H / 2 for itself, 64 for scores of 128 keys and 32 for their bf16
# probabilities; dq needs H / 2, and step / 2 each for scores and their gradient; dk and dv need H together, step / 2
# twice, step / 4 for bf16 probabilities, and as much for one of lse, delta and k_start at a time.
FORWARD = {64: Blocks(128, 2), 128: Blocks(128, 2)}
DQ = {64: Blocks(128, 4), 128: Blocks(64, 4)}
DKV = {64: Blocks(64, 4), 128: Blocks(64, 4)}


def hopper_kernel(body, out_type, grid, memory, interpreter_memory, interpret):
    """A kernel of two warpgroups over `grid` (name -> size, the last one fastest). Its body is called with the arrays
    and, by name, with shared memory and barriers: `memory`, and where it is interpreted `interpreter_memory`."""
    used = REDUCTION_SCRATCH + sum(map(_bytes, memory.values()))
    if used > SHARED_MEMORY:
        raise ValueError(f"a kernel's blocks must fit into {SHARED_MEMORY} bytes of shared memory, got {used}")
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=memory | interpreter_memory if interpret else memory,
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_SCRATCH),
        interpret=interpret,
    )


def _bytes(memory):
    if isinstance(memory, plgpu.Barrier):
        return 8 * int(np.prod(memory.num_barriers))
    x = memory.inner_aval
    return -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // ALIGNMENT) * ALIGNMENT


def tiled(*shape, dtype):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def ring_barriers(stages, copies):
    """(ready, free) of a ring's slots: filled by so many copies, read by all warpgroups."""
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return ready, plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)


def rows(i, w):
    """The rows of block i that warpgroup w computes."""
    return pl.ds(i * BLOCK + w * ROWS, ROWS)


def fill_ring(stages, blocks, copy):
    """copy(count) the first blocks of so many into the ring, as many as it holds; `count` blocks come before each."""
    pl.loop(0, jnp.minimum(stages, blocks))(copy)


def refill_ring(w, count, stages, blocks, free, copy):
    """At the block that `count` blocks come before, let the first warpgroup copy one into the slot of an earlier block.

    That is stages // 2 blocks back, so that the other warpgroup may be as far behind before the first one waits."""
    earlier = count - stages // 2

    @pl.when((w == 0) & (earlier >= 0) & (earlier + stages < blocks))
    def _():
        plgpu.barrier_wait(free.at[lax.rem(earlier, stages)])
        copy(earlier + stages)


def is_partial(ranges, block):
    """Whether a block that one program visits, by its `blocks.Ranges`, has entries to mask."""
    _, full_first, full_last, _ = ranges
    return (block < full_first) | (block >= full_last)


def positions(s, axis, first):
    """The query or the key of each entry of the scores s, int32: it counts from `first` along the axis."""
    layout, spread = ((PER_ROW, per_row), (PER_COLUMN, per_column))[axis]
    # as a vector: of a matrix the compiler would keep many registers
    numbers = plgpu.broadcasted_iota(jnp.int32, (s.shape[axis],), 0, layout=layout) + first
    return spread(numbers, s.shape[1 - axis])


def mask(s, query, key, start):
    """Scores with -inf where the query, which sees the keys start..query, does not see the key."""
    return jnp.where((key <= query) & (key >= start), s, -jnp.inf)


def full(shape, value, layout):
    """An array of one value, float32, in a layout of the kernel's."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def per_row(x, columns):
    """A vector [rows] as a matrix [rows, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def per_column(x, rows):
    """A vector [columns] as a matrix [rows, columns]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def left_operand(x, memory, w):
    """x as the left operand of a wgmma: itself, in registers, or a copy in `memory` where that is given."""
    if memory is None:
        return x
    memory[w] = x
    plgpu.commit_smem()
    return memory.at[w]


def accumulate(acc, a, b, interpret):
    """acc + a @ b"""
    if not interpret:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))

    def product(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
