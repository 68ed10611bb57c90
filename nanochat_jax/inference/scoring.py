"""How likely a given text is, token for token, without generating one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.shapes import padded_size
from nanochat_jax.model.loss import pick_logprob

BLOCK = 64  # tokens whose logits are held at once


class Scores(NamedTuple):
    """Of n ids: what the model says of each but the first, after all that stand before it, at temperature 1."""

    logprobs: np.ndarray  # float32 [n-1]
    likeliest: np.ndarray  # int32 [n-1,N]: the ids with the largest log-probabilities, in this order
    likeliest_logprobs: np.ndarray  # float32 [n-1,N]


class Scorer:
    """Scores texts with an engine's network; each new size of a text, of which there are few, is compiled.

    alternatives: N, how many of the likeliest tokens to tell beside each."""

    def __init__(self, engine: Engine, alternatives: int = 0):
        self.engine, self.alternatives = engine, alternatives

        @jax.jit
        def score(params, ids):  # int32 [1,T+1] -> (float32 [T], int32 [T,N], float32 [T,N])
            model = nnx.merge(engine.programs.graphdef, params)
            x, _ = model.hidden(ids[:, :-1])

            def block(inputs):
                x, targets = inputs  # [BLOCK,D], int32 [BLOCK]
                logits = model.logits(x)
                logprobs, normalizer = pick_logprob(logits, targets)
                values, likeliest = jax.lax.top_k(logits, alternatives)
                return logprobs, likeliest.astype(jnp.int32), values - normalizer[:, None]

            blocks = x[0].reshape(-1, BLOCK, x.shape[-1]), ids[0, 1:].reshape(-1, BLOCK)
            return jax.tree.map(lambda y: y.reshape(x.shape[1], *y.shape[2:]), jax.lax.map(block, blocks))

        self._score = score

    def __call__(self, params: Any, ids: Sequence[int]) -> Scores:
        """params: the engine's `cast_params`. ValueError: there are more ids than the context has room for."""
        n = len(ids)
        if n > self.engine.context:
            raise ValueError(f"a text to be scored must have at most {self.engine.context:,} tokens, got {n:,}")
        padded = np.full((1, padded_size(n, BLOCK) + 1), self.engine.tokenizer.bos, np.int32)
        padded[0, :n] = ids
        with jax.set_mesh(self.engine.mesh):
            scores = jax.device_get(self._score(params, padded))
        return Scores(*(x[: n - 1] for x in scores))
