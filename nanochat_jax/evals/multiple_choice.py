"""Multiple choice without generating: the logits of the letters that a question offers."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.inference.shapes import padded_size
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt

# Of the questions in one pass, per device: on CPU as many as fit its cache (with four times more it takes 1.4 times as
# long).
PASS_TOKENS_CPU, PASS_TOKENS = 2048, 16384


def make_letter_logits(
    config: GPTConfig,
    mesh: Mesh,
    pad: int,
    *,
    dtype=jnp.float32,
    attention: str = "chunked",
    rows: int | None = None,
):
    """-> letter_logits(params, prompts, letters, progress): float32 [number of letters] for each prompt.

    They are the logits after the prompt's last token (token ids, at least one) at the letters' token ids. Prompts of
    similar length share a pass of `rows` a device (default: as many as fill PASS_TOKENS), padded with the token `pad`
    at the end, which does not change the logits before it. Passes have few shapes (`padded_size`), so few programs are
    compiled. progress(prompts done, prompts in all) is called after each pass, with at most one more on the devices;
    what it raises ends the call. FloatingPointError: a logit is not finite.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)
    devices = row_shards(mesh)
    tokens = PASS_TOKENS_CPU if jax.default_backend() == "cpu" else PASS_TOKENS

    @jax.jit
    def logits_of(params, batch):
        model = nnx.merge(graphdef, params)
        x, _ = model.hidden(batch["ids"])
        last = jnp.take_along_axis(x, batch["last"][:, None, None], 1)[:, 0]
        return jnp.take_along_axis(model.logits(last), batch["letters"], 1)

    def passes(prompts, letters):
        """(numbers of the prompts in a pass, its batch), the longest prompts first."""
        offered = padded_size(max(map(len, letters), default=0), 8)
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while waiting:
            T = padded_size(len(prompts[waiting[0]]), 16)
            B = devices * min(rows or max(1, tokens // T), padded_size(-(-len(prompts) // devices)))
            numbers, waiting = waiting[:B], waiting[B:]
            ids = np.full((B, T), pad, np.int32)
            last = np.zeros(B, np.int32)
            letter_ids = np.zeros((B, offered), np.int32)
            for row, i in enumerate(numbers):
                ids[row, : len(prompts[i])] = prompts[i]
                last[row] = len(prompts[i]) - 1
                letter_ids[row, : len(letters[i])] = letters[i]
            yield numbers, {"ids": ids, "last": last, "letters": letter_ids}

    def letter_logits(
        params,
        prompts: Sequence[Sequence[int]],
        letters: Sequence[Sequence[int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray]:
        dispatched = ((n, logits_of(params, to_global(batch, mesh))) for n, batch in passes(prompts, letters))
        result, done = [None] * len(prompts), 0
        for (numbers, logits), _ in itertools.pairwise(itertools.chain(dispatched, [None])):  # the next runs already
            for i, row in zip(numbers, jax.device_get(logits)):
                result[i] = row[: len(letters[i])]
                if not np.isfinite(result[i]).all():
                    raise FloatingPointError(
                        f"the model's logits are not finite after prompt {i}: go back to an earlier checkpoint, and "
                        "lower the learning rates if this model is in training"
                    )
            done += len(numbers)
            if progress:
                progress(done, len(prompts))
        return result

    return letter_logits
