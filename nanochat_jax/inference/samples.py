"""A sample: how it is drawn, what comes out, and one in progress, whose calculator calls are answered here.

Facts of nanochat (its Engine, 2026): a result is forced as output_start, text, output_end; a token sampled where a
forced one is due is thrown away; assistant_end and bos end a sample, also inside a block; forced tokens count as new.
"""

from dataclasses import dataclass, field

import numpy as np

from nanochat_jax.inference.calculator import calculate


@dataclass(frozen=True)
class SamplingParams:
    """How to draw: temperature 0 is greedy, top_k 0 no limit; max_new_tokens counts forced tokens too."""

    temperature: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 256

    def __post_init__(self):
        for holds, sentence in (
            (0 <= self.temperature <= 1e30, f"--temperature must be a number from 0 to 1e30, got {self.temperature}"),
            (_whole(self.top_k, 0), f"--top-k must be at least 1, or 0 for no limit, got {self.top_k}"),
            (_whole(self.max_new_tokens, 1), f"--max-new-tokens must be at least 1, got {self.max_new_tokens}"),
        ):
            if not holds:
                raise ValueError(sentence)


def _whole(value, least: int) -> bool:
    return isinstance(value, int | np.integer) and value >= least


@dataclass(frozen=True)
class ToolCall:
    """What stood in a calculator block, and the text that was forced in answer; None: refused, nothing forced."""

    expression: str
    result: str | None


@dataclass
class Sample:
    """A prompt's continuation. An end token that was sampled is its last."""

    tokens: np.ndarray  # int32 [n]
    mask: np.ndarray  # uint8 [n]: 1 sampled, 0 forced
    logprobs: np.ndarray  # float32 [n]: of a sampled token, under the distribution it was drawn from; 0 where forced
    policy_logprobs: np.ndarray  # the same, under the model's own distribution: temperature 1, no limit
    ended: bool  # by an end token; False: cut at max_new_tokens or at the context's end
    tool_calls: list[ToolCall]


class ControlTokens:
    """The special tokens that a sample goes by.

    ends: ids of which one that was sampled ends a sample. block: (start, end) of what the calculator is asked, None
    without tools. output: (start, end) of what it answers."""

    def __init__(self, tokenizer, tools: bool = True):
        def pair(name):
            return tuple(tokenizer.special(f"<|{name}_{side}|>") for side in ("start", "end"))

        self.tokenizer = tokenizer
        self.ends = {tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>")}
        self.block = pair("python") if tools else None
        self.output = pair("output")


@dataclass
class Row:
    """A sample in progress: what it has so far, and the tokens that will be forced next."""

    control_tokens: ControlTokens
    prompt: int
    sample: int
    room: int  # tokens that may still come
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    block: list[int] | None = None  # tokens since python_start
    ended: bool = False

    @property
    def finished(self) -> bool:
        return self.ended or self.room == 0

    def extend(self, tokens: list[int], logprobs: list[float], policy_logprobs: list[float]) -> None:
        """Take a call's tokens; of these the queue's come first."""
        forced = min(len(self.queue), len(tokens))
        del self.queue[:forced]
        self.tokens += tokens
        self.logprobs += logprobs
        self.policy_logprobs += policy_logprobs
        self.mask += [0] * forced + [1] * (len(tokens) - forced)
        self.room -= len(tokens)
        self.ended = len(tokens) > forced and tokens[-1] in self.control_tokens.ends
        if self.control_tokens.block is not None:
            for token in tokens:
                self._watch(token)

    def _watch(self, token: int) -> None:
        """Collect what stands in a block, and answer it where it closes."""
        start, end = self.control_tokens.block
        if token == start:
            self.block = []
        elif token == end:
            if self.block:
                self._call(self.control_tokens.tokenizer.decode(self.block))
            self.block = None
        elif self.block is not None:
            self.block.append(token)

    def _call(self, expression: str) -> None:
        result = calculate(expression)
        self.calls.append(ToolCall(expression, result))
        if result is not None:
            start, end = self.control_tokens.output
            self.queue = [start, *self.control_tokens.tokenizer.encode(result), end]

    def result(self) -> Sample:
        return Sample(
            np.asarray(self.tokens, np.int32),
            np.asarray(self.mask, np.uint8),
            np.asarray(self.logprobs, np.float32),
            np.asarray(self.policy_logprobs, np.float32),
            self.ended,
            self.calls,
        )


def answer_text(tokenizer, sample: Sample) -> str:
    """What `evaluate` and `reward` judge: the generated text with the tool's results, without the end token.

    Special tokens are as written in the vocabulary, as in nanochat."""
    return tokenizer.decode(sample.tokens[: len(sample.tokens) - sample.ended])
