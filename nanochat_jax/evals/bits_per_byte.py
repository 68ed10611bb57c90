"""Bits per byte: how well a model predicts text, in a unit that does not depend on its vocabulary."""

import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.data.batches import validation_batches, without_documents
from nanochat_jax.data.rows import PackedRows
from nanochat_jax.distributed.mesh import row_part
from nanochat_jax.distributed.sharding import to_global
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


def measure_rows(
    bits_per_byte: Callable[..., float],
    params,
    rows: PackedRows,
    mesh: Mesh,
    *,
    n_rows: int,
    rows_per_batch: int,
    document_mask: bool,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """What `make_bits_per_byte` measures on the first `n_rows` rows, the same at each call; params are on the mesh.

    document_mask: documents in one row do not see each other. progress(batches done, batches at most) is called after
    each batch, on all processes equally often."""
    process_index, process_count = row_part(mesh)
    batches = validation_batches(
        rows, n_rows=n_rows, rows_per_batch=rows_per_batch, process_index=process_index, process_count=process_count
    )
    on_devices = (to_global(b if document_mask else without_documents(b), mesh) for b in batches)
    done = itertools.count(1)
    return bits_per_byte(params, on_devices, progress and (lambda: progress(next(done), -(-n_rows // rows_per_batch))))
