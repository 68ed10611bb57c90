"""The device's side of generation: prompts go in, and R rows (slots) grow by up to C tokens a call.

`kv_cache` explains the three caches. Every device works on its own rows and never waits for another.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.sharding import matrices_in
from nanochat_jax.inference import sampling
from nanochat_jax.inference.kv_cache import Cache, CacheLayout, reach
from nanochat_jax.model.attention import decode_attention
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import pick_logprob


class PrefillBatch(NamedTuple):
    """B prompts, as many for each device."""

    ids: np.ndarray  # int32 [B,T]
    lengths: np.ndarray  # int32 [B]: tokens of each
    groups: np.ndarray  # int32 [B]: whose prompt it is, from 0 on each device; a number beyond the last: nobody's


class SlotTable(NamedTuple):
    """What a call must know of its rows. The host keeps it as NumPy arrays, and writes into them between calls."""

    token: np.ndarray  # int32 [R]: fed first
    previous: np.ndarray  # int32 [R]: the token before it
    prompt_length: np.ndarray  # int32 [R]: tokens in the prompt cache
    length: np.ndarray  # int32 [R]: tokens in the continuation cache
    remaining: np.ndarray  # int32 [R]: tokens that may still come; 0: the row is idle
    block: np.ndarray  # int32 [R]: tokens since python_start; -1: not in a call
    forced: np.ndarray  # int32 [R,C]: these come first, whatever is sampled
    forced_count: np.ndarray  # int32 [R]
    seed: np.ndarray  # uint32 [R]: the key's first number; after it come the call's step, and these two
    example: np.ndarray  # uint32 [R]: the prompt's number
    sample: np.ndarray  # uint32 [R]: the sample's number
    temperature: np.ndarray  # float32 [R]
    top_k: np.ndarray  # int32 [R]; 0: all tokens
    top_p: np.ndarray  # float32 [R]; 1: all tokens
    alternatives: np.ndarray  # bool [R]: whether the likeliest tokens are wanted beside those that are drawn


class DecodeSettings(NamedTuple):
    """What holds for all rows of a call: scalars."""

    step: np.uint32  # the second number of the key, after the seed
    refill: np.bool  # whether rows that are done have more to do: then a call returns early for them too


class DecodeOutput(NamedTuple):
    """What a call adds to each row. What is behind `count` has no meaning."""

    tokens: jax.Array  # int32 [R,C]
    logprobs: jax.Array  # float32 [R,C]: under the distribution that was sampled from; 0 where forced
    policy_logprobs: jax.Array  # float32 [R,C]: under the model's own distribution; 0 where forced
    likeliest: jax.Array  # int32 [R,C,N]: the N tokens with the largest logits, in this order, in rows that want them
    likeliest_logprobs: jax.Array  # float32 [R,C,N]: theirs, under the model's own distribution
    count: jax.Array  # int32 [R]


class DecodeState(NamedTuple):
    """What the loop over a call's tokens carries."""

    index: jax.Array  # int32: of the token
    token: jax.Array  # int32 [R]: to be fed
    previous: jax.Array  # int32 [R]: the token before it
    block: jax.Array  # int32 [R], as in SlotTable
    running: jax.Array  # bool [R]: the row gets another token
    idle: jax.Array  # bool [R]: the row has stopped, and the host could go on with it, or with another sample
    idle_steps: jax.Array  # int32: sum over the steps so far of the rows that were idle
    fresh: Cache
    output: DecodeOutput


class GenerationPrograms:
    """What runs on the devices: prefill, decode and append, each compiled once for each set of shapes.

    ends: ids that end a row when they are sampled. block: the ids around a tool's call, None without tools:
    a row that closes a block which is not empty waits for the host. attention: the prefill's backend. alternatives: how
    many of the likeliest tokens a row may want to know of.
    """

    def __init__(
        self,
        config: GPTConfig,
        mesh: Mesh,
        *,
        dtype,
        chunk: int,
        ends,
        block: tuple[int, int] | None,
        attention: str = "chunked",
        alternatives: int = 0,
    ):
        self.config, self.mesh, self.dtype, self.chunk = config, mesh, jnp.dtype(dtype), chunk
        self.ends, self.block, self.alternatives = tuple(ends), block, alternatives
        on_cpu = mesh.devices.flat[0].platform == "cpu"  # where bfloat16 keys and values are read at half the speed
        self.layout = CacheLayout(config, chunk, jnp.dtype(jnp.float32) if on_cpu else self.dtype)
        self.graphdef, _ = abstract_gpt(config, dtype, attention)
        self.compiled = {}
        self.rows = P(mesh.axis_names)  # how an axis of rows, groups or prompts is split
        self.decode_specs = (P(), self.rows, self.rows, self.rows, P())
        self.whole = NamedSharding(mesh, P())
        # A program for each parameter: in one for all, XLA for TPU holds a second copy of them until the last is there.
        self._cast_one = jax.jit(partial(matrices_in, self.dtype), out_shardings=self.whole)

    @property
    def compiles(self) -> int:
        """Programs that were compiled so far."""
        return len(self.compiled)

    def cast_params(self, params):
        """Parameters, sharded in any way -> whole copies on every device, matrices in the compute type, the rest in
        float32 as in training. Parameters that come from here are returned as they are."""

        def is_ready(w):  # on one device every sharding is whole
            placed = isinstance(w, jax.Array) and w.sharding.is_equivalent_to(self.whole, w.ndim)
            return placed and (w.ndim < 2 or w.dtype == self.dtype)

        return params if all(map(is_ready, jax.tree.leaves(params))) else jax.tree.map(self._cast_one, params)

    # ----------------------------------------------------------------------------------------------------- programs
    def empty(self, cache: Cache) -> Cache:
        """Zeros for a cache of the layout's."""
        sharding = NamedSharding(self.mesh, self.rows)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=sharding), cache)

    def prefill(self, params, prompt: Cache, batch: PrefillBatch) -> Cache:
        """The prompt cache with these prompts in their groups; the old one is gone."""
        specs = (P(), self.rows, self.rows)
        return self._program(self._prefill, specs, params, prompt, batch, donate=(1,))(params, prompt, batch)

    def decode(self, params, prompt: Cache, continuation: Cache, slots: SlotTable, settings: DecodeSettings):
        """Up to C tokens for each row -> (DecodeOutput, the fresh cache).

        A row stops where it ends, has no tokens remaining or waits for the host. A call that keeps too many rows idle
        returns early: those that wait, and with `refill` those that are done.
        """
        args = params, prompt, continuation, slots, settings
        return self._program(self._decode, self.decode_specs, *args)(*args)

    def append(self, continuation: Cache, fresh: Cache, length, size: int) -> Cache:
        """The continuation with room for `size` tokens, and with the fresh cache behind its `length` int32 [R] tokens;
        the old one is gone. A row needs length + C <= size, or what it holds is lost."""
        args = self.resize(continuation, self.layout.continuation(len(length), size)), fresh, length
        return self._program(self.layout.append, (self.rows,) * 3, *args, donate=(0,))(*args)

    def take(self, prompt: Cache, continuation: Cache, fresh: Cache, groups, rows) -> tuple[Cache, Cache, Cache]:
        """The caches of these groups and rows alone, int32 numbers that count from 0 on each device, in this order."""
        args = prompt, continuation, fresh, groups, rows
        return self._program(_take, (self.rows,) * 5, *args)(*args)

    def resize(self, cache: Cache, wanted: Cache) -> Cache:
        """The cache with the columns of another of its kind, of the layout's; tokens beyond them are lost."""
        columns = tuple(k.shape[2] for k, _ in wanted)
        had = tuple(k.shape[2] for k, _ in cache)
        if not (any(had) and any(columns)):
            return self.empty(wanted)
        if columns == had:
            return cache
        fit = partial(_fit, columns)  # by itself: fused with the writing, XLA's loop on CPU is ten times slower
        return self._program(fit, (self.rows,), cache, name=f"resize {columns}")(cache)

    def compile_decode(self, params, groups: int, rows_of_group: int, prompt_size: int, continuation_size: int):
        """The program of `decode` with caches of up to these sizes, compiled without an array; params: abstract, in any
        types and shardings."""
        caches = self._caches(groups, rows_of_group, prompt_size, continuation_size)
        slots = empty_slots(groups * rows_of_group, self.chunk)
        settings = DecodeSettings(np.uint32(0), np.bool(False))
        args = jax.eval_shape(partial(matrices_in, self.dtype), params), *caches, slots, settings
        return self._program(self._decode, self.decode_specs, *map(self._abstract, args, self.decode_specs))

    def compile_prefill(self, params, groups: int, prompt_size: int, prompts: int, T: int):
        """The program of `prefill` of so many prompts, all devices together, of up to T tokens; else as
        `compile_decode`."""
        batch = PrefillBatch(np.zeros((prompts, T), np.int32), *np.zeros((2, prompts), np.int32))
        specs = (P(), self.rows, self.rows)
        args = jax.eval_shape(partial(matrices_in, self.dtype), params), self.layout.prompt(groups, prompt_size), batch
        return self._program(self._prefill, specs, *map(self._abstract, args, specs), donate=(1,))

    def compile_append(self, rows: int, size: int):
        """The program of `append` for so many rows and a cache of `size` tokens, compiled without an array."""
        caches = self.layout.continuation(rows, size), self.layout.continuation(rows, self.chunk)
        args = *caches, np.zeros(rows, np.int32)
        specs = (self.rows,) * 3
        return self._program(self.layout.append, specs, *map(self._abstract, args, specs), donate=(0,))

    def cache_bytes(self, groups: int, rows_of_group: int, prompt_size: int, continuation_size: int) -> int:
        """Bytes of the two caches of `compile_decode`, all devices together."""
        caches = self._caches(groups, rows_of_group, prompt_size, continuation_size)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))

    def _caches(self, groups: int, rows_of_group: int, prompt_size: int, continuation_size: int):
        return self.layout.prompt(groups, prompt_size), self.layout.continuation(
            groups * rows_of_group, continuation_size
        )

    def _abstract(self, tree, spec):
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def _program(self, function, in_specs, *args, donate=(), name: str | None = None):
        """`function` compiled for arguments of these shapes, of which each device gets its part."""
        key = name or function.__name__, tuple(x.shape for x in jax.tree.leaves(args))
        if key not in self.compiled:
            alone = AbstractMesh((), (), abstract_device=self.mesh.abstract_mesh.abstract_device)

            def local(*args):
                with jax.sharding.use_abstract_mesh(alone):  # in here every device is alone
                    return function(*args)

            mapped = jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=self.rows, check_vma=False)
            self.compiled[key] = jax.jit(mapped, donate_argnums=donate).lower(*args).compile()
        return self.compiled[key]

    # -------------------------------------------------------------------------------------- what one device computes
    def _prefill(self, params, prompt: Cache, batch: PrefillBatch) -> Cache:
        _, kept = nnx.merge(self.graphdef, params).hidden(batch.ids)

        def write(stored, new):
            size = min(stored.shape[2], new.shape[1])
            start = jnp.maximum(batch.lengths - stored.shape[2], 0)
            tail = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=size))(new, start)
            tail = jnp.moveaxis(tail, 1, 2).astype(stored.dtype)
            return stored.at[batch.groups, :, :size].set(tail, mode="drop")

        return jax.tree.map(write, prompt, kept)

    def _decode(self, params, prompt: Cache, continuation: Cache, slots: SlotTable, settings: DecodeSettings):
        model, C = nnx.merge(self.graphdef, params), self.chunk
        R, scale = len(slots.token), self.config.head_dim**-0.5
        keys = sampling.sample_keys(slots.seed, settings.step, slots.example, slots.sample)
        start = slots.prompt_length + slots.length  # position of the first token to be fed
        distances = self.layout.distances(prompt, continuation, slots.prompt_length, slots.length)
        patience = jnp.sum(slots.remaining > 0) // 2  # idle steps of rows that cost as much as another call

        def step(state: DecodeState) -> DecodeState:
            i, output = state.index, state.output
            position = start + i
            visible = {
                window: [(d >= 0) & (d + i <= reach(window)) for d in parts] for window, parts in distances.items()
            }

            def attend(layer, q, k, v):
                fresh = tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, 2).astype(old.dtype), i, 2)
                    for old, new in zip(state.fresh[layer], (k, v))
                )
                window = self.config.windows[layer]
                age = i - jnp.arange(C)
                current = (age >= 0) & (age <= reach(window))
                caches = prompt[layer], continuation[layer], fresh
                seen = *visible[window], jnp.tile(current, (R, 1))
                parts = [(k, v, columns) for (k, v), columns in zip(caches, seen) if k.shape[2]]
                return decode_attention(q[:, 0], parts, scale)[:, None], fresh

            x, fresh = model.hidden(
                state.token[:, None], positions=position[:, None], previous=state.previous, attend=attend
            )
            draws = sampling.uniform_draws(keys, position + 1)
            logits = model.logits(x[:, 0])

            def choose(logits):
                return sampling.choose_tokens(logits, draws, slots.temperature, slots.top_k)

            sampled, logprob = jax.lax.cond(  # two branches with all of it: else each step would copy the logits
                jnp.any(slots.top_p < 1),
                lambda: choose(sampling.within_top_p(logits, slots.temperature, slots.top_k, slots.top_p)),
                lambda: choose(logits),
            )
            policy_logprob, normalizer = pick_logprob(logits, sampled)
            likeliest, their_logprobs = self._likeliest(logits, normalizer, slots.alternatives)
            forced = i < slots.forced_count
            token = jnp.where(forced, jax.lax.dynamic_index_in_dim(slots.forced, i, 1, False), sampled)
            count = output.count + state.running
            ended = (~forced & jnp.isin(token, jnp.asarray(self.ends))) | (count == slots.remaining)
            block, waits = self._watch_block(state.block, token)
            idle = state.idle | (state.running & ~ended & waits) | (state.running & ended & settings.refill)
            return DecodeState(
                index=i + 1,
                token=token,
                previous=state.token,
                block=block,
                running=state.running & ~ended & ~waits,
                idle=idle,
                idle_steps=state.idle_steps + jnp.sum(idle),
                fresh=fresh,
                output=DecodeOutput(
                    tokens=output.tokens.at[:, i].set(token),
                    logprobs=output.logprobs.at[:, i].set(jnp.where(forced, 0.0, logprob)),
                    policy_logprobs=output.policy_logprobs.at[:, i].set(jnp.where(forced, 0.0, policy_logprob)),
                    likeliest=output.likeliest.at[:, i].set(likeliest),
                    likeliest_logprobs=output.likeliest_logprobs.at[:, i].set(their_logprobs),
                    count=count,
                ),
            )

        def unfinished(state: DecodeState):
            return (state.index < C) & jnp.any(state.running) & (state.idle_steps <= patience)

        c = self.config
        empty = jnp.zeros((R, c.n_kv_head, C, c.head_dim), self.layout.dtype)
        numbers, ids = jnp.zeros((R, C), jnp.float32), jnp.zeros((R, C), jnp.int32)
        wide = (*ids.shape, self.alternatives)
        state = DecodeState(
            index=jnp.int32(0),
            token=slots.token,
            previous=slots.previous,
            block=slots.block,
            running=slots.remaining > 0,
            idle=jnp.zeros(R, bool),
            idle_steps=jnp.int32(0),
            fresh=((empty, empty),) * c.n_layer,
            output=DecodeOutput(
                tokens=ids,
                logprobs=numbers,
                policy_logprobs=numbers,
                likeliest=jnp.zeros(wide, jnp.int32),
                likeliest_logprobs=jnp.zeros(wide, jnp.float32),
                count=jnp.zeros(R, jnp.int32),
            ),
        )
        state = jax.lax.while_loop(unfinished, step, state)
        return state.output, state.fresh

    def _likeliest(self, logits, normalizer, wanted):
        """logits [R,V], normalizer [R], wanted bool [R] -> (ids, log-probabilities) [R,N]; zeros where nobody wants
        them."""
        shape = len(logits), self.alternatives

        def largest():
            values, ids = jax.lax.top_k(logits, self.alternatives)
            return ids.astype(jnp.int32), values - normalizer[:, None]

        def none():
            return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

        return jax.lax.cond(jnp.any(wanted), largest, none) if self.alternatives else none()

    def _watch_block(self, block, token):
        """Block lengths and new tokens [R] -> (block lengths, which rows have just closed one that is not empty)."""
        if self.block is None:
            return block, jnp.zeros(len(block), bool)
        start, end = self.block
        inside = jnp.where(block < 0, block, block + 1)
        return jnp.where(token == start, 0, jnp.where(token == end, -1, inside)), (token == end) & (block > 0)


def empty_slots(rows: int, chunk: int) -> SlotTable:
    """Idle rows."""
    shapes = {"forced": (rows, chunk)}
    types = dict.fromkeys(("seed", "example", "sample"), np.uint32)
    types |= {"temperature": np.float32, "top_p": np.float32, "alternatives": np.bool}
    return SlotTable(*(np.zeros(shapes.get(name, rows), types.get(name, np.int32)) for name in SlotTable._fields))


def _take(prompt: Cache, continuation: Cache, fresh: Cache, groups, rows) -> tuple[Cache, Cache, Cache]:
    """What one device has of `GenerationPrograms.take`."""

    def pick(numbers, cache):
        return jax.tree.map(lambda x: jnp.take(x, numbers, 0, mode="clip"), cache)

    return pick(groups, prompt), pick(rows, continuation), pick(rows, fresh)


def _fit(columns: tuple[int, ...], cache: Cache) -> Cache:
    """With so many columns for each layer."""

    def fit(x, size):
        return jnp.pad(x[:, :, :size], [(0, 0), (0, 0), (0, max(size - x.shape[2], 0)), (0, 0)])

    return tuple(tuple(fit(x, size) for x in layer) for size, layer in zip(columns, cache))
