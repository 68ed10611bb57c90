"""Measurement of a model: bits per byte, and the logits of the letters that a question offers."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import token_logprobs


def make_bits_per_byte(config: GPTConfig, token_bytes: np.ndarray, *, dtype=jnp.float32, attention: str = "chunked"):
    """-> bits_per_byte(params, batches): nats at targets that stand for bytes, over their bytes times ln 2.

    token_bytes int32 [V]: length of each token, 0 for specials, which count on neither side. batches: an iterable of
    dicts with inputs, targets, document_start int32 [B,T] and weights [B,T] (0 = not counted). The sums run over all
    batches before the division; no bytes at all gives infinity. Independent of vocabulary and batch size.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)
    lengths = jnp.asarray(np.asarray(token_bytes, np.int32))

    @jax.jit
    def sums(params, batch):
        model = nnx.merge(graphdef, params)
        x, _ = model.hidden(batch["inputs"], document_start=batch["document_start"])
        head = {"cap": config.logit_cap, "vocab_size": config.vocab_size}
        logp = token_logprobs(x, params["lm_head"], batch["targets"], **head)
        counted = jnp.where(batch["weights"] > 0, lengths[batch["targets"]], 0)
        return -jnp.sum(jnp.where(counted > 0, logp, 0.0)), jnp.sum(counted)

    def bits_per_byte(params, batches: Iterable[dict]) -> float:
        parts = [sums(params, batch) for batch in batches]  # dispatched, not awaited
        nats, total = (math.fsum(float(part[i]) for part in parts) for i in (0, 1))
        return nats / (math.log(2) * total) if total else math.inf

    return bits_per_byte
