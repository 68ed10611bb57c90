"""Multiple choice without generating: the logits of the letters that a question offers."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.evals.passes import check_finite, run_passes
from nanochat_jax.inference.shapes import padded_size
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt

LENGTH_STEP = 16  # tokens


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

    They are the logits after the prompt's last token (token ids, at least one) at the letters' token ids. pad, rows,
    progress: see `run_passes`. FloatingPointError: a logit is not finite.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)

    @jax.jit
    def logits_of(params, batch):
        model = nnx.merge(graphdef, params)
        x, _ = model.hidden(batch["ids"])
        last = jnp.take_along_axis(x, batch["last"][:, None, None], 1)[:, 0]
        return jnp.take_along_axis(model.logits(last), batch["letters"], 1)

    def letter_logits(
        params,
        prompts: Sequence[Sequence[int]],
        letters: Sequence[Sequence[int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray]:
        offered = padded_size(max(map(len, letters), default=0), 8)

        def last_and_letters(numbers, shape):
            last, letter_ids = np.zeros(shape[0], np.int32), np.zeros((shape[0], offered), np.int32)
            for row, i in enumerate(numbers):
                last[row] = len(prompts[i]) - 1
                letter_ids[row, : len(letters[i])] = letters[i]
            return {"last": last, "letters": letter_ids}

        result = [None] * len(prompts)
        passes = run_passes(
            lambda batch: logits_of(params, batch),
            prompts,
            last_and_letters,
            mesh=mesh,
            pad=pad,
            size=partial(padded_size, step=LENGTH_STEP),
            rows=rows,
            progress=progress,
        )
        for numbers, logits in passes:
            for i, row in zip(numbers, logits):
                result[i] = row[: len(letters[i])]
                check_finite(result[i], f"after prompt {i}")
        return result

    return letter_logits
