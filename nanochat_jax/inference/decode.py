"""The device's side of generation: prompts go in, and R rows (slots) grow by up to C tokens a call.

Rows form groups of M neighbours that share a prompt. A row attends to three parts:
    prompt  k, v [R/M,K,Sp,H]  of its group, written once a prompt; all but the prompt's last token
    own     k, v [R,K,So,H]    what the row has been fed since, the prompt's last token first
    fresh   k, v [R,K,C,H]     of the call that is running
The big parts are only read inside the loop, so nothing copies them, whatever layout the compiler prefers there; after a
call `append` adds the fresh part to the own one. A layer with window W needs the last W tokens only: its prompt part
holds the prompt's end, and its own part is a ring. Every device works on its own rows and never waits for another.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.inference import sampling
from nanochat_jax.model.attention import decode_attention
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import pick_logprob

NO_RING = 1 << 30


class Programs:
    """What runs on the devices, compiled once for each set of shapes; `compiles` counts them.

    ends: ids that end a row when they are sampled. block: the ids around a calculator's expression, None without tools:
    a row that closes such a block waits for the host, if there is anything in it. attention: the prefill's backend.
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
    ):
        self.config, self.mesh, self.dtype, self.chunk = config, mesh, jnp.dtype(dtype), chunk
        self.rows = P(mesh.axis_names)  # of whatever has a leading axis of rows, groups or prompts
        self.ends, self.block = tuple(ends), block
        on_cpu = mesh.devices.flat[0].platform == "cpu"  # where bfloat16 keys and values are read at half the speed
        self.kept_dtype = jnp.dtype(jnp.float32) if on_cpu else self.dtype
        self.graphdef, _ = abstract_gpt(config, dtype, attention)
        self.compiled = {}
        self._cast = jax.jit(
            lambda tree: jax.tree.map(lambda w: w.astype(self.dtype) if w.ndim > 1 else w, tree),
            out_shardings=NamedSharding(mesh, P()),
        )

    @property
    def compiles(self) -> int:
        return len(self.compiled)

    @property
    def peak_memory(self) -> int:
        """Bytes on a device while the largest of them runs, by the compiler's count."""
        sizes = [program.memory_analysis() for program in self.compiled.values()]
        parts = ("argument", "output", "temp")
        return max(
            (sum(getattr(s, f"{part}_size_in_bytes") for part in parts) - s.alias_size_in_bytes for s in sizes if s),
            default=0,
        )

    def place(self, params):
        """Parameters -> whole copies on every device, matrices in the compute type, lambdas as in training float32."""
        return self._cast(params)

    # ------------------------------------------------------------------------------------------------------- shapes
    def ring(self, window: int) -> int:
        """Columns after which a layer's own part begins again: the window, and a call's tokens beside it."""
        return NO_RING if window < 0 else -(-window // 16) * 16 + self.chunk

    def own_columns(self, window: int, size: int) -> int:
        """Columns that hold `size` tokens; a ring has room for a call's tokens behind its end."""
        return size if size <= self.ring(window) else self.ring(window) + self.chunk

    def prompt_columns(self, window: int, size: int) -> int:
        """Of a prompt part for up to `size` tokens."""
        return size if window < 0 else min(size, -(-window // 16) * 16)

    def empty_prompts(self, groups: int, size: int):
        """Prompt parts of all layers: ((k, v), ...)."""
        return self._zeros(self._part_shapes(groups, self.prompt_columns, size))

    def empty_own(self, rows: int, size: int = 0):
        """Own parts for up to `size` tokens."""
        return self._zeros(self._part_shapes(rows, self.own_columns, size))

    def _part_shapes(self, count, columns, size):
        c = self.config
        return [(count, c.n_kv_head, columns(window, size), c.head_dim) for window in c.windows]

    def _zeros(self, shapes):
        sharding = NamedSharding(self.mesh, self.rows)
        return tuple(tuple(jnp.zeros(shape, self.kept_dtype, device=sharding) for _ in "kv") for shape in shapes)

    # ----------------------------------------------------------------------------------------------------- programs
    def admit(self, params, prompts, batch):
        """Prefill: batch = {"ids": int32 [B,T], "lengths": [B], "groups": [B]} -> prompts with these in their groups.

        Group numbers count from 0 on each device; a number that does not exist leaves the prompt out."""
        return self._run("admit", self._admit, (P(), self.rows, self.rows), self.rows, (1,), params, prompts, batch)

    def decode(self, params, prompts, own, rows, settings):
        """Up to C tokens for each row -> ({"tokens": int32 [R,C], "logprobs" and "policy_logprobs" (of the model's own
        distribution): float32 [R,C], "count": [R]}, fresh).

        rows, int32 [R]: token to be fed, previous (the one before it), prompt (tokens in the prompt part), filled
        (tokens in the own part), room (tokens that may still come, 0: idle), block (tokens since python_start, -1:
        none), forced [R,C] and forced_count (these come first, whatever is sampled), example and sample (uint32, for
        the key). settings, scalars: temperature, top_k, seed, step, refill. A row stops where it ends, has no room or
        waits for the host. A call that keeps too many rows idle returns early: those that wait, and with `refill` those
        that are done. What `tokens` holds behind `count` is nothing.
        """
        return self._run(*self._decode_program(), params, prompts, own, rows, settings)

    def append(self, own, fresh, filled, size: int):
        """Own parts with the fresh ones written at `filled` int32 [R], and room for `size` tokens or what they had.

        A row must have filled + C <= size, or what it holds is lost."""
        had = tuple(k.shape[2] for k, _ in own)
        columns = tuple(max(self.own_columns(w, size), n) for w, n in zip(self.config.windows, had))
        if not any(had):
            own = self.empty_own(len(filled), size)
        elif columns != had:  # by itself: XLA on CPU fuses it with the writing into a loop that is ten times slower
            own = self._run(f"grow {columns}", partial(_grow, columns), (self.rows,), self.rows, (), own)
        return self._run("append", self._append, (self.rows, self.rows, self.rows), self.rows, (0,), own, fresh, filled)

    def compile_decode(self, params, groups: int, shared: int, prompt_size: int, own_size: int):
        """The program of `decode` for `groups` of `shared` rows, prompts and own parts of up to these sizes, compiled
        without an array; params: abstract, in any types and shardings."""

        def abstract(tree, spec):
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        rows = groups * shared
        parts = (
            self._part_shapes(groups, self.prompt_columns, prompt_size),
            self._part_shapes(rows, self.own_columns, own_size),
        )
        parts = tuple(tuple((jax.ShapeDtypeStruct(s, self.kept_dtype),) * 2 for s in shapes) for shapes in parts)
        settings = {"temperature": np.float32(1), "top_k": np.int32(0), "refill": np.bool(False)}
        settings |= {"seed": np.uint32(0), "step": np.uint32(0)}
        return self._program(
            *self._decode_program(),
            abstract(jax.eval_shape(self._cast, params), P()),
            *(abstract(part, self.rows) for part in parts),
            abstract(empty_table(rows, self.chunk), self.rows),
            abstract(settings, P()),
        )

    def cache_bytes(self, groups: int, shared: int, prompt_size: int, own_size: int) -> int:
        """Of the prompt parts and own parts of `compile_decode`, all devices together."""
        shapes = self._part_shapes(groups, self.prompt_columns, prompt_size)
        shapes += self._part_shapes(groups * shared, self.own_columns, own_size)
        return sum(2 * math.prod(shape) for shape in shapes) * self.kept_dtype.itemsize

    def _decode_program(self):
        return "decode", self._decode, (P(), self.rows, self.rows, self.rows, P()), self.rows, ()

    def _run(self, name, function, in_specs, out_specs, donate, *args):
        return self._program(name, function, in_specs, out_specs, donate, *args)(*args)

    def _program(self, name, function, in_specs, out_specs, donate, *args):
        key = (name, tuple(x.shape for x in jax.tree.leaves(args)))
        if key not in self.compiled:

            def local(*args):
                with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # in here every device is alone
                    return function(*args)

            mapped = jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            self.compiled[key] = jax.jit(mapped, donate_argnums=donate).lower(*args).compile()
        return self.compiled[key]

    # -------------------------------------------------------------------------------------- what one device computes
    def _admit(self, params, prompts, batch):
        lengths, groups = batch["lengths"], batch["groups"]
        _, kept = nnx.merge(self.graphdef, params).hidden(batch["ids"])

        def write(stored, new):
            size = min(stored.shape[2], new.shape[1])
            start = jnp.maximum(lengths - stored.shape[2], 0)
            tail = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=size))(new, start)
            return stored.at[groups, :, :size].set(jnp.moveaxis(tail, 1, 2).astype(stored.dtype), mode="drop")

        return jax.tree.map(write, prompts, kept)

    def _decode(self, params, prompts, own, rows, settings):
        model, C = nnx.merge(self.graphdef, params), self.chunk
        R, scale = len(rows["token"]), self.config.head_dim**-0.5
        keys = sampling.row_keys(settings["seed"], settings["step"], rows["example"], rows["sample"])
        start = rows["prompt"] + rows["filled"]  # position of the first token to be fed
        distances = self._distances(prompts, own, rows)
        patience = jnp.sum(rows["room"] > 0) // 2  # idle steps of rows that cost as much as another call

        def step(state):
            i = state["step"]
            token, position = state["token"], start + i
            visible = {
                window: [(d >= 0) & (d + i <= (NO_RING if window < 0 else window)) for d in parts]
                for window, parts in distances.items()
            }

            def attend(layer, q, k, v):
                fresh = tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, 2).astype(old.dtype), i, 2)
                    for old, new in zip(state["fresh"][layer], (k, v))
                )
                window = self.config.windows[layer]
                age = i - jnp.arange(C)
                current = (age >= 0) & (age <= (NO_RING if window < 0 else window))
                sources = [*zip((prompts[layer], own[layer]), visible[window]), (fresh, jnp.tile(current, (R, 1)))]
                parts = [(k, v, seen) for (k, v), seen in sources if k.shape[2]]
                return decode_attention(q[:, 0], parts, scale)[:, None], fresh

            x, fresh = model.hidden(
                token[:, None], positions=position[:, None], previous=state["previous"], attend=attend
            )
            draws = sampling.uniforms(keys, position + 1)
            logits = model.logits(x[:, 0])
            sampled, logprob = sampling.choose(logits, draws, settings["temperature"], settings["top_k"])
            policy_logprob, _ = pick_logprob(logits, sampled)
            forced = i < rows["forced_count"]
            following = jnp.where(forced, jax.lax.dynamic_index_in_dim(rows["forced"], i, 1, False), sampled)
            running = state["running"]
            count = state["count"] + running
            ended = (~forced & jnp.isin(following, jnp.asarray(self.ends))) | (count == rows["room"])
            block, waits = self._watch(state["block"], following)
            idle = state["idle"] | (running & ~ended & waits) | (running & ended & settings["refill"])
            return {
                "step": i + 1,
                "token": following,
                "previous": token,
                "fresh": fresh,
                "block": block,
                "running": running & ~ended & ~waits,
                "idle": idle,
                "idle_steps": state["idle_steps"] + jnp.sum(idle),
                "count": count,
                "tokens": state["tokens"].at[:, i].set(following),
                "logprobs": state["logprobs"].at[:, i].set(jnp.where(forced, 0.0, logprob)),
                "policy_logprobs": state["policy_logprobs"].at[:, i].set(jnp.where(forced, 0.0, policy_logprob)),
            }

        def unfinished(state):
            return (state["step"] < C) & jnp.any(state["running"]) & (state["idle_steps"] <= patience)

        c = self.config
        empty = jnp.zeros((R, c.n_kv_head, C, c.head_dim), self.kept_dtype)
        state = {
            "step": jnp.int32(0),
            "token": rows["token"],
            "previous": rows["previous"],
            "fresh": ((empty, empty),) * c.n_layer,
            "block": rows["block"],
            "running": rows["room"] > 0,
            "idle": jnp.zeros(R, bool),
            "idle_steps": jnp.int32(0),
            "count": jnp.zeros(R, jnp.int32),
            "tokens": jnp.zeros((R, C), jnp.int32),
            "logprobs": jnp.zeros((R, C), jnp.float32),
            "policy_logprobs": jnp.zeros((R, C), jnp.float32),
        }
        state = jax.lax.while_loop(unfinished, step, state)
        return {name: state[name] for name in ("tokens", "logprobs", "policy_logprobs", "count")}, state["fresh"]

    def _watch(self, block, token):
        """Block lengths and new tokens -> (block lengths, which rows have just closed a block that holds something)."""
        if self.block is None:
            return block, jnp.zeros(len(block), bool)
        start, end = self.block
        inside = jnp.where(block < 0, block, block + 1)
        return jnp.where(token == start, 0, jnp.where(token == end, -1, inside)), (token == end) & (block > 0)

    def _distances(self, prompts, own, rows):
        """Window -> int32 ([R,Sp], [R,So]): steps from a column's token to the first to be fed; negative: no token."""
        result = {}
        for window, (prompt, _), (kept, _) in zip(self.config.windows, prompts, own):
            length, filled = rows["prompt"][:, None], rows["filled"][:, None]
            S, columns = prompt.shape[2], jnp.arange(kept.shape[2])[None]
            position = jnp.maximum(length - S, 0) + jnp.arange(S)[None]
            in_prompt = jnp.where(position < length, length + filled - position, -NO_RING)
            back = jnp.mod(filled - 1 - columns, self.ring(window))  # a ring's column holds the latest that fell on it
            held = (back < filled) & (columns < self.ring(window))
            result[window] = in_prompt, jnp.where(held, 1 + back, -NO_RING)
        return result

    def _append(self, own, fresh, filled):
        put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 1))

        def write(ring, old, new):
            at = filled % ring
            out = put(old, new, at)
            if out.shape[2] <= ring:
                return out
            # What went past the ring's end belongs at its beginning.
            wrapped = jnp.arange(self.chunk)[None] < (at + self.chunk - ring)[:, None]
            head = jnp.where(wrapped[:, None, :, None], out[:, :, ring:], out[:, :, : self.chunk])
            return jax.lax.dynamic_update_slice_in_dim(out, head, 0, 2)

        rings = [self.ring(window) for window in self.config.windows]
        return tuple(tuple(write(ring, *pair) for pair in zip(o, n)) for ring, o, n in zip(rings, own, fresh))


def empty_table(rows: int, chunk: int) -> dict[str, np.ndarray]:
    """`rows` of `decode` for so many idle ones."""
    counts = ("token", "previous", "prompt", "filled", "room", "block", "forced_count")
    table = {name: np.zeros(rows, np.int32) for name in counts} | {"forced": np.zeros((rows, chunk), np.int32)}
    return table | {name: np.zeros(rows, np.uint32) for name in ("example", "sample")}


def _grow(columns, own):
    """Own parts with this many columns a layer."""
    return tuple(
        tuple(jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)]) for x in layer)
        for size, layer in zip(columns, own)
    )
