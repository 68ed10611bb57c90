"""Flash attention on Hopper GPUs with our own kernels (Pallas, Mosaic GPU), forward and backward.

The mathematics is FlashAttention-2's (arXiv 2307.08691). As in FlashAttention-3 (arXiv 2407.08608), TMA copies run
ahead into a ring of shared memory, and of a program's two warpgroups one multiplies (wgmma) while the other does its
softmax in registers. There is no third that copies, see primitives.py: one of the two starts the copies. Each kernel
visits only the blocks of blocks.py and masks only those that need it. There are no atomics: every output element
has one writer, so results repeat bit for bit.

What kernels take and return: flash.py; `scale` must be above 0. `interpret` runs the same programs, warpgroups and
barriers included, on a CPU. Names end in _gm for arrays in global and _sm for those in shared memory; other scratch
names are barriers: *_in, ready: the data has arrived; free: it is no longer needed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nanochat_jax.model.attention.blocks import key_ranges
from nanochat_jax.model.attention.flash import FlashKernels, flash_attention, lower_once
from nanochat_jax.model.attention.hopper import primitives as hopper
from nanochat_jax.model.attention.hopper.backward import grad_keys, grad_queries
from nanochat_jax.model.attention.hopper.primitives import BLOCK, FORWARD, ROWS, WARPGROUPS


def mosaic_gpu_refuses(q_shape, kv_heads: int, dtype) -> str | None:
    """Why the kernels cannot take q of shape [B,T,N,H], this many kv heads and this type, as a sentence; else None."""
    *_, N, H = q_shape
    if H not in FORWARD:
        sizes = " or ".join(map(str, FORWARD))
        return f"the Hopper kernel takes heads of size {sizes}, got {H}"
    if N % kv_heads:
        return f"the Hopper kernel takes query heads that are a multiple of the kv heads, got {N} and {kv_heads}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the Hopper kernel takes bfloat16 or float16, got {jnp.dtype(dtype)}"
    return None


def mosaic_gpu(q, k, v, k_start, scale, window, *, interpret=False):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] with the keys k_start[t]..t, k_start int32 [B,T] ->
    [B,T,N,H]. bf16 or f16 in and out, float32 softmax and accumulators; repeats bit for bit, forward and backward.

    `window` is not needed: the blocks that it excludes follow from k_start, as those of other documents do. `interpret`
    (True or pallas' InterpretGPUParams) runs the kernels on a CPU, slowly. ValueError where `mosaic_gpu_refuses`.
    """
    del window
    if why := mosaic_gpu_refuses(q.shape, k.shape[2], q.dtype):
        raise ValueError(why)
    scale = float(scale)
    if not scale > 0:  # the kernels take the largest score before they scale it
        q, scale = q * jnp.sign(scale).astype(q.dtype), abs(scale) or 1.0
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    return flash_attention(KERNELS, q, k, v, k_start, scale, interpret)


@lower_once
def output(q, k, v, k_start, scale, interpret):
    """-> (o [B,T,N,H] in q's type, lse [B,N,T], the base-2 logarithm of each query's sum of exponentials)."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    step, stages = FORWARD[H]
    ranges = key_ranges(k_start, BLOCK, step)

    def attention_forward(*arrays, q_sm, k_sm, v_sm, lse_sm, q_in, k_in, v_in, turns, p_sm=None):
        q_gm, k_gm, v_gm, start_gm, *ranges_gm, o_gm, lse_gm = arrays
        b, n, w = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("warpgroup")
        i = T // BLOCK - 1 - lax.axis_index("i")  # the longest first: causality gives block i i + 1 blocks of keys
        visited = tuple(x[b, i] for x in ranges_gm)
        first, last = visited[0], visited[-1]

        def copy(j, source, ring, arrived):
            here, slot = (b, pl.ds(j * step, step), lax.div(n, G)), lax.rem(j - first, stages)
            plgpu.copy_gmem_to_smem(source.at[here], ring.at[slot], arrived.at[slot])

        def copy_keys(j):
            copy(j, k_gm, k_sm, k_in)

        def copy_values(j):
            copy(j, v_gm, v_sm, v_in)

        def refill(j, copy):
            """Copy into block j's slot when the second warpgroup has read it: the first, a turn ahead, has too."""
            pl.when((w == 1) & (j + stages < last))(lambda: copy(j + stages))

        @pl.when(w == 1)
        def _():
            for other in range(WARPGROUPS):
                plgpu.copy_gmem_to_smem(q_gm.at[b, hopper.rows(i, other), n], q_sm.at[other], q_in.at[other])

            @pl.loop(first, jnp.minimum(first + stages, last))
            def _(j):
                copy_keys(j)
                copy_values(j)

        def take_turns():
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

        start = plgpu.load(start_gm.at[b, hopper.rows(i, w)], layout=hopper.PER_ROW, optimized=False)

        def visit(j, carry):
            o, top, total = carry  # sum of values, largest score, sum of exponentials so far
            slot = lax.rem(j - first, stages)
            plgpu.barrier_wait(k_in.at[slot])

            def scores(acc):
                plgpu.wgmma(acc, q_sm.at[w], k_sm.at[slot].transpose((1, 0)))
                take_turns()  # the other warpgroup multiplies while this one is at its softmax
                return acc[...]

            s = pl.run_scoped(scores, plgpu.ACC((ROWS, step), jnp.float32))
            refill(j, copy_keys)

            def masked(s):
                query, key = hopper.positions(s, 0, i * BLOCK + w * ROWS), hopper.positions(s, 1, j * step)
                return hopper.mask(s, query, key, hopper.per_row(start, step))

            s = lax.cond(hopper.is_partial(visited, j), masked, lambda s: s, s)
            new_top = jnp.maximum(top, s.max(axis=1) * scale)
            p = jnp.exp2(s * scale - hopper.per_row(new_top, step))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + p.sum(axis=1)
            # all of the softmax before the other warpgroup's turn, none of it after
            softmax = (p.astype(q.dtype), o * hopper.per_row(shrink, H), total, new_top)
            p, o, total, top = lax.optimization_barrier(softmax)
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(v_in.at[slot])
            plgpu.barrier_wait(turns)
            o = hopper.accumulate(o, hopper.left_operand(p, p_sm, w), v_sm.at[slot], interpret)
            refill(j, copy_values)
            return o, top, total

        plgpu.barrier_wait(q_in.at[w])
        pl.when(w == 1)(take_turns)  # half a step behind the first
        o = hopper.full((ROWS, H), 0.0, hopper.WGMMA)
        top, total = hopper.full((ROWS,), -1e30, hopper.PER_ROW), hopper.full((ROWS,), 0.0, hopper.PER_ROW)
        o, top, total = lax.fori_loop(first, last, visit, (o, top, total))
        pl.when(w == 0)(take_turns)
        q_sm[w] = (o / hopper.per_row(total, H)).astype(q.dtype)
        lse_sm[w] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_sm.at[w], o_gm.at[b, hopper.rows(i, w), n])
        plgpu.copy_smem_to_gmem(lse_sm.at[w], lse_gm.at[b, n, hopper.rows(i, w)])
        plgpu.wait_smem_to_gmem(0)

    own, ring = hopper.tiled(WARPGROUPS, ROWS, H, dtype=q.dtype), hopper.tiled(stages, step, H, dtype=q.dtype)
    ready = plgpu.Barrier(num_barriers=stages)
    barriers = {"k_in": ready, "v_in": ready}
    barriers |= {"q_in": plgpu.Barrier(num_barriers=WARPGROUPS), "turns": plgpu.Barrier(num_arrivals=WARPGROUPS)}
    memory = {"q_sm": own, "k_sm": ring, "v_sm": ring, "lse_sm": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)}
    interpreter_memory = {"p_sm": hopper.tiled(WARPGROUPS, ROWS, step, dtype=q.dtype)}
    out_type = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    grid = {"b": B, "n": N, "i": T // BLOCK}
    kernel = hopper.hopper_kernel(attention_forward, out_type, grid, memory | barriers, interpreter_memory, interpret)
    return kernel(q, k, v, k_start, *ranges)


KERNELS = FlashKernels(BLOCK, output, grad_queries, grad_keys)
