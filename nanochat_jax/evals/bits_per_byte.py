"""Bits per byte: how well a model predicts text, in a unit that does not depend on its vocabulary."""

import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import token_logprobs


def make_bits_per_byte(config: GPTConfig, token_bytes: np.ndarray, *, dtype=jnp.float32, attention: str = "chunked"):
    """-> bits_per_byte(params, batches, check): nats of the targets that stand for bytes, over their bytes times ln 2.

    token_bytes int32 [V]: length of each token, 0 for special tokens, which count neither as nats nor as bytes.
    batches: dicts with inputs, targets, document_start int32 [B,T] and weights [B,T] (0 = not counted). The sums run
    over all batches before the division, so batch sizes do not matter; without any byte the result is infinity. check()
    is called after each batch, with at most one more on the devices; what it raises ends the measurement, so that must
    be the same on all processes.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)
    lengths = jnp.asarray(np.asarray(token_bytes, np.int32))

    @jax.jit
    def nats_and_bytes(params, batch):
        model = nnx.merge(graphdef, params)
        x, _ = model.hidden(batch["inputs"], document_start=batch["document_start"])
        logprobs = token_logprobs(
            x, params["lm_head"], batch["targets"], cap=config.logit_cap, vocab_size=config.vocab_size
        )
        counted = jnp.where(batch["weights"] > 0, lengths[batch["targets"]], 0)
        return -jnp.sum(jnp.where(counted > 0, logprobs, 0.0)), jnp.sum(counted)

    def bits_per_byte(params, batches: Iterable[dict], check: Callable[[], None] | None = None) -> float:
        dispatched = (nats_and_bytes(params, batch) for batch in batches)
        sums = []
        for part, _ in itertools.pairwise(itertools.chain(dispatched, [None])):  # the next one runs already
            sums.append(jax.device_get(part))
            if check:
                check()
        nats, total = (math.fsum(float(part[i]) for part in sums) for i in (0, 1))
        return nats / (math.log(2) * total) if total else math.inf

    return bits_per_byte
