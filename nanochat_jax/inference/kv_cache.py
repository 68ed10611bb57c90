"""Where the keys and values of earlier tokens are while R rows (slots) are decoded, up to C tokens in a device call.

Groups of M neighbouring rows continue the same prompt. A cache holds a pair (k, v) for each layer, and there are three:
    prompt        k, v [R/M,K,Sp,H]  of a group: the prompt but for its last token, written once by the prefill
    continuation  k, v [R,K,So,H]    of a row: what it was fed in earlier calls, the prompt's last token first
    fresh         k, v [R,K,C,H]     of a row: what it is fed in the running call
A call only reads the two large ones, so nothing copies them, whatever layout the compiler prefers in its loop; after
the call `append` writes the fresh cache into the continuation.

A layer with a window of W tokens needs no others, so its prompt cache holds the prompt's end, and its continuation is a
ring: token n is in column n % ring. The ring has C columns more than the window, because `append` always writes C of
them, also for a row that was fed fewer tokens. Behind the ring are C more: a call's tokens are written in one piece,
and what went past the end is then copied to the beginning.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.model.gpt import GPTConfig

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # (k, v) of each layer
UNLIMITED = 1 << 30  # tokens; more than any context has
NO_TOKEN = -UNLIMITED  # the distance of a column that holds none


def reach(window: int) -> int:
    """How many tokens before its own a layer with this window attends to."""
    return UNLIMITED if window < 0 else window


@dataclass(frozen=True)
class CacheLayout:
    """The caches' shapes and columns; `distances` and `append` run on a device."""

    config: GPTConfig
    chunk: int  # C
    dtype: Any  # of keys and values

    def ring(self, window: int) -> int:
        """Columns of a continuation after which it begins again."""
        return UNLIMITED if window < 0 else -(-window // 16) * 16 + self.chunk

    def prompt(self, groups: int, size: int) -> Cache:
        """The prompt cache for up to `size` tokens, as ShapeDtypeStructs."""
        columns = [size if window < 0 else min(size, -(-window // 16) * 16) for window in self.config.windows]
        return self._abstract(groups, columns)

    def continuation(self, rows: int, size: int) -> Cache:
        """The continuation cache for up to `size` tokens, as ShapeDtypeStructs."""
        rings = map(self.ring, self.config.windows)
        return self._abstract(rows, [size if size <= ring else ring + self.chunk for ring in rings])

    def _abstract(self, count: int, columns: list[int]) -> Cache:
        shapes = [(count, self.config.n_kv_head, S, self.config.head_dim) for S in columns]
        return tuple((jax.ShapeDtypeStruct(shape, self.dtype),) * 2 for shape in shapes)

    def distances(self, prompt: Cache, continuation: Cache, prompt_length, length) -> dict[int, tuple]:
        """Window -> int32 ([R,Sp], [R,So]): how many tokens before the next one to be fed each column's token stands,
        NO_TOKEN where there is none. prompt_length and length int32 [R]: tokens in the prompt and in the continuation.
        """
        result = {}
        for window, (in_prompt, _), (in_row, _) in zip(self.config.windows, prompt, continuation):
            size, count = prompt_length[:, None], length[:, None]
            S, columns = in_prompt.shape[2], jnp.arange(in_row.shape[2])[None]
            position = jnp.maximum(size - S, 0) + jnp.arange(S)[None]
            to_prompt = jnp.where(position < size, size + count - position, NO_TOKEN)
            back = jnp.mod(count - 1 - columns, self.ring(window))  # a column holds the latest token that fell on it
            held = (back < count) & (columns < self.ring(window))
            result[window] = to_prompt, jnp.where(held, 1 + back, NO_TOKEN)
        return result

    def append(self, continuation: Cache, fresh: Cache, length) -> Cache:
        """Continuations of `length` int32 [R] tokens with a call's tokens behind them; they must have the columns."""
        put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 1))

        def write(ring, old, new):
            at = length % ring
            out = put(old, new, at)
            if out.shape[2] <= ring:
                return out
            wrapped = jnp.arange(self.chunk)[None] < (at + self.chunk - ring)[:, None]
            head = jnp.where(wrapped[:, None, :, None], out[:, :, ring:], out[:, :, : self.chunk])
            return jax.lax.dynamic_update_slice_in_dim(out, head, 0, 2)

        rings = map(self.ring, self.config.windows)
        return tuple(tuple(map(write, (ring, ring), old, new)) for ring, old, new in zip(rings, continuation, fresh))
