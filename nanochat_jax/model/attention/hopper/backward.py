"""The Hopper kernels of flash attention's gradients: dq, and dk with dv. Shapes, units and names as in forward.py."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nanochat_jax.model.attention.blocks import key_ranges, query_ranges
from nanochat_jax.model.attention.flash import lower_once
from nanochat_jax.model.attention.hopper import primitives as hopper
from nanochat_jax.model.attention.hopper.primitives import BLOCK, DKV, DQ, PER_COLUMN, PER_ROW, ROWS, WARPGROUPS


@lower_once
def grad_queries(q, k, v, k_start, do, lse, delta, scale, interpret):
    """-> dq [B,T,N,H] in q's type. do is the output's gradient, delta [B,N,T] its products with the output."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    step, stages = DQ[H]
    ranges = key_ranges(k_start, BLOCK, step)

    def attention_dq(*arrays, q_sm, do_sm, k_sm, v_sm, q_in, ready, free, ds_sm=None):
        q_gm, k_gm, v_gm, start_gm, do_gm, lse_gm, delta_gm, *ranges_gm, dq_gm = arrays
        b, n, w = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("warpgroup")
        i = T // BLOCK - 1 - lax.axis_index("i")  # the longest first
        visited = tuple(x[b, i] for x in ranges_gm)
        first, last = visited[0], visited[-1]

        def copy(count):
            here, slot = (b, pl.ds((first + count) * step, step), lax.div(n, G)), lax.rem(count, stages)
            plgpu.copy_gmem_to_smem(k_gm.at[here], k_sm.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(v_gm.at[here], v_sm.at[slot], ready.at[slot])

        @pl.when(w == 0)
        def _():
            for other in range(WARPGROUPS):
                plgpu.copy_gmem_to_smem(q_gm.at[b, hopper.rows(i, other), n], q_sm.at[other], q_in.at[other])
                plgpu.copy_gmem_to_smem(do_gm.at[b, hopper.rows(i, other), n], do_sm.at[other], q_in.at[other])
            hopper.fill_ring(stages, last - first, copy)

        start = plgpu.load(start_gm.at[b, hopper.rows(i, w)], layout=PER_ROW, optimized=False)
        lse = plgpu.load(lse_gm.at[b, n, hopper.rows(i, w)], layout=PER_ROW, optimized=False)
        delta = plgpu.load(delta_gm.at[b, n, hopper.rows(i, w)], layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(q_in.at[w])

        def accumulate(dq):
            @pl.loop(first, last)
            def _(j):
                count = j - first
                slot = lax.rem(count, stages)
                plgpu.barrier_wait(ready.at[slot])

                def products(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, q_sm.at[w], k_sm.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, do_sm.at[w], v_sm.at[slot].transpose((1, 0)))
                    hopper.refill_ring(w, count, stages, last - first, free, copy)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # the second product still runs

                    def masked(s):
                        query, key = hopper.positions(s, 0, i * BLOCK + w * ROWS), hopper.positions(s, 1, j * step)
                        return hopper.mask(s, query, key, hopper.per_row(start, step))

                    s = lax.cond(hopper.is_partial(visited, j), masked, lambda s: s, s)
                    p = jnp.exp2(s * scale - hopper.per_row(lse, step))
                    return (p * (dp_acc[...] - hopper.per_row(delta, step))).astype(q.dtype)

                acc = plgpu.ACC((ROWS, step), jnp.float32)
                ds = pl.run_scoped(products, acc, acc)
                plgpu.wgmma(dq, hopper.left_operand(ds, ds_sm, w), k_sm.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            return dq[...]

        dq = pl.run_scoped(accumulate, plgpu.ACC((ROWS, H), jnp.float32))
        q_sm[w] = (dq * (scale * math.log(2))).astype(q.dtype)  # scale without its log2(e)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_sm.at[w], dq_gm.at[b, hopper.rows(i, w), n])
        plgpu.wait_smem_to_gmem(0)

    own, ring = hopper.tiled(WARPGROUPS, ROWS, H, dtype=q.dtype), hopper.tiled(stages, step, H, dtype=q.dtype)
    ready, free = hopper.ring_barriers(stages, copies=2)
    q_in = plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)
    memory = {"q_sm": own, "do_sm": own, "k_sm": ring, "v_sm": ring, "q_in": q_in, "ready": ready, "free": free}
    interpreter_memory = {"ds_sm": hopper.tiled(WARPGROUPS, ROWS, step, dtype=q.dtype)}
    out_type, grid = jax.ShapeDtypeStruct(q.shape, q.dtype), {"b": B, "n": N, "i": T // BLOCK}
    kernel = hopper.hopper_kernel(attention_dq, out_type, grid, memory, interpreter_memory, interpret)
    return kernel(q, k, v, k_start, do, lse, delta, *ranges)


@lower_once
def grad_keys(q, k, v, k_start, do, lse, delta, scale, interpret):
    """-> dk and dv [B,T,K,H] in k's type, each summed over its group of query heads in float32."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    step, stages = DKV[H]
    ranges = query_ranges(k_start, step, BLOCK)

    def attention_dkv(
        *arrays, k_sm, v_sm, q_sm, do_sm, start_sm, lse_sm, delta_sm, k_in, ready, free, p_sm=None, ds_sm=None
    ):
        q_gm, k_gm, v_gm, start_gm, do_gm, lse_gm, delta_gm, *ranges_gm, dk_gm, dv_gm = arrays
        b, m, j, w = (lax.axis_index(x) for x in ("b", "m", "j", "warpgroup"))  # m: kv head
        visited = tuple(x[b, j] for x in ranges_gm)
        first, last = visited[0], visited[-1]
        blocks = G * (last - first)  # all query heads of the group visit block first, then all the next

        def copy(count):
            n, slot = m * G + lax.rem(count, G), lax.rem(count, stages)
            here = pl.ds((first + lax.div(count, G)) * step, step)
            copies = [(x.at[b, here, n], y) for x, y in ((q_gm, q_sm), (do_gm, do_sm))]
            copies += [(x.at[b, n, here], y) for x, y in ((lse_gm, lse_sm), (delta_gm, delta_sm))]
            for source, ring in [*copies, (start_gm.at[b, here], start_sm)]:
                plgpu.copy_gmem_to_smem(source, ring.at[slot], ready.at[slot])

        @pl.when(w == 0)
        def _():
            for other in range(WARPGROUPS):
                plgpu.copy_gmem_to_smem(k_gm.at[b, hopper.rows(j, other), m], k_sm.at[other], k_in.at[other])
                plgpu.copy_gmem_to_smem(v_gm.at[b, hopper.rows(j, other), m], v_sm.at[other], k_in.at[other])
            hopper.fill_ring(stages, blocks, copy)

        plgpu.barrier_wait(k_in.at[w])

        def accumulate(dk, dv):
            @pl.loop(0, blocks)
            def _(count):
                i = first + lax.div(count, G)
                slot = lax.rem(count, stages)
                plgpu.barrier_wait(ready.at[slot])

                def per_query(x):
                    return hopper.per_column(plgpu.load(x.at[slot], layout=PER_COLUMN), ROWS)

                def products(s_acc, dp_acc):  # transposed: a row is a key, a column a query
                    plgpu.wgmma(s_acc, k_sm.at[w], q_sm.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, v_sm.at[w], do_sm.at[slot].transpose((1, 0)))
                    hopper.refill_ring(w, count, stages, blocks, free, copy)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # the second product still runs

                    def masked(s):
                        query, key = hopper.positions(s, 1, i * step), hopper.positions(s, 0, j * BLOCK + w * ROWS)
                        return hopper.mask(s, query, key, per_query(start_sm))

                    s = lax.cond(hopper.is_partial(visited, i), masked, lambda s: s, s)
                    p = jnp.exp2(s * scale - per_query(lse_sm))
                    plgpu.wgmma(dv, hopper.left_operand(p.astype(q.dtype), p_sm, w), do_sm.at[slot])
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)  # dv's product still runs
                    return (p * (dp - per_query(delta_sm))).astype(q.dtype)

                acc = plgpu.ACC((ROWS, step), jnp.float32)
                ds = pl.run_scoped(products, acc, acc)
                plgpu.wgmma(dk, hopper.left_operand(ds, ds_sm, w), q_sm.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            return dk[...], dv[...]

        acc = plgpu.ACC((ROWS, H), jnp.float32)
        dk, dv = pl.run_scoped(accumulate, acc, acc)
        k_sm[w] = (dk * (scale * math.log(2))).astype(k.dtype)  # scale without its log2(e)
        v_sm[w] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_sm.at[w], dk_gm.at[b, hopper.rows(j, w), m])
        plgpu.copy_smem_to_gmem(v_sm.at[w], dv_gm.at[b, hopper.rows(j, w), m])
        plgpu.wait_smem_to_gmem(0)

    own, ring = hopper.tiled(WARPGROUPS, ROWS, H, dtype=q.dtype), hopper.tiled(stages, step, H, dtype=q.dtype)
    vector = plgpu.SMEM((stages, step), jnp.float32)
    start = plgpu.SMEM((stages, step), jnp.int32)
    ready, free = hopper.ring_barriers(stages, copies=5)
    barriers = {"k_in": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS), "ready": ready, "free": free}
    memory = {"k_sm": own, "v_sm": own, "q_sm": ring, "do_sm": ring} | barriers
    memory |= {"start_sm": start, "lse_sm": vector, "delta_sm": vector}
    interpreter_memory = dict.fromkeys(("p_sm", "ds_sm"), hopper.tiled(WARPGROUPS, ROWS, step, dtype=q.dtype))
    out_type = (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype))
    grid = {"b": B, "m": K, "j": T // BLOCK}
    kernel = hopper.hopper_kernel(attention_dkv, out_type, grid, memory, interpreter_memory, interpret)
    return kernel(q, k, v, k_start, do, lse, delta, *ranges)
