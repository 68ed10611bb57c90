"""What a base model continues a few texts with, to be read by people."""

from collections.abc import Callable, Sequence
from typing import Any

from nanochat_jax.distributed.signals import collect
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.tokenizer import Tokenizer

PROMPTS = (  # facts, a rule, arithmetic, a story
    "The largest ocean on Earth is",
    "Water is made of hydrogen and",
    "One, two, three, four,",
    "The opposite of early is",
    "Seven plus two equals",
    "Once upon a time there was a",
)
SAMPLE_TOKENS = 16


def sample_prompts(tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """PROMPTS as token ids behind bos, as far as they fit into rows of `context` tokens with SAMPLE_TOKENS more."""
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in PROMPTS]
    return [ids for ids in prompts if len(ids) + SAMPLE_TOKENS <= context]


def sample_texts(
    engine: Engine,
    params: Any,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The prompts, without their bos, with the likeliest continuation of each, a line each; the same on all processes,
    which must call it together. params: the engine's `cast_params`. progress: of `Engine.generate`."""
    sampling = SamplingParams(temperature=0.0, max_new_tokens=SAMPLE_TOKENS)

    def texts() -> list[str]:
        groups = engine.generate(params, prompts, sampling, progress=progress)
        decode = engine.tokenizer.decode
        return [printable(decode([*prompt[1:], *sample.tokens])) for prompt, (sample,) in zip(prompts, groups)]

    return collect("samples", texts)[0]


def printable(text: str) -> str:
    """One line that no terminal takes for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
