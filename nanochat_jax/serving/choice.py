"""One answer as it comes: tokens become text in whole characters, tool calls, and log-probabilities."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanochat_jax.serving.worker import Progress
from nanochat_jax.tokenizer import Tokenizer


class Part(NamedTuple):
    """A piece of an answer, as a conversation's assistant messages have them in training."""

    type: str  # "text", "python" or "python_output"
    text: str


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability in nats under the model's own distribution."""

    token: int
    logprob: float | None  # None: nothing stands before it
    alternatives: tuple[tuple[int, float], ...]  # the likeliest ids with theirs, in this order


def token_score(token: int, logprob: float | None, ids: np.ndarray, logprobs: np.ndarray, count: int) -> TokenScore:
    """ids and logprobs [N]: the likeliest, of which `count` were asked for. Where the token is one of them, both have
    the same number, also in the last digit: by that lm-evaluation-harness knows that it is the likeliest."""
    pairs = zip(ids[:count].tolist(), logprobs[:count].tolist())
    return TokenScore(token, logprob, tuple((i, logprob if i == token else number) for i, number in pairs))


@dataclass(frozen=True)
class Delta:
    """What is new in one of a request's answers."""

    index: int  # of the answer: those to the first prompt come first
    parts: list[Part]
    scores: list[TokenScore]
    finish_reason: str | None  # None: more will come


class Choice:
    """One answer. `finish_reason` is None until it has ended, "stop" by an end token or a stop text, or "length"."""

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int], stop: Sequence[str], alternatives: int | None):
        """ends: tokens that end it. stop: texts that end it and are no part of it. alternatives: see Options."""
        self.tokenizer, self.finish_reason, self.tokens = tokenizer, None, 0  # tokens: how many it has
        self._ends, self._stop, self._alternatives = frozenset(ends), tuple(stop), alternatives
        self._names = {i: name for name, i in tokenizer.special_tokens.items()}
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text that may be the beginning of a stop text
        self._call: list[int] | None = None  # tokens of a call, or of its result
        self._in_output = False
        self._stopped = False  # by a stop text

    def take(self, progress: Progress) -> tuple[list[Part], list[TokenScore]]:
        """What is new in the answer, and its tokens' log-probabilities where they were asked for: of all that the model
        drew, the end token included."""
        parts, scores = [], []
        for i, (token, sampled) in enumerate(zip(progress.tokens, progress.sampled)):
            self.tokens += 1
            if sampled and self._alternatives is not None:
                of_token = progress.alternatives[i]
                scores.append(token_score(token, progress.logprobs[i], *of_token, self._alternatives))
            if sampled and token in self._ends:
                self.finish_reason = "stop"
            else:
                self._take_token(token, bool(sampled), parts)
            if self.finish_reason:
                break
        if progress.finished and not self.finish_reason:
            self.finish_reason = "length"
        if self.finish_reason:
            self._flush(parts)
        return parts, scores

    def _take_token(self, token: int, sampled: bool, parts: list[Part]) -> None:
        """Output tokens have a meaning only where the result of a tool was put in."""
        name = self._names.get(token)
        if name is None:
            if self._call is not None:
                self._call.append(token)
            else:
                self._take_text(self._bytes.decode(self.tokenizer.decode_bytes([token])), parts)
        elif name == "<|python_start|>" or (name == "<|output_start|>" and not sampled):
            self._flush(parts)  # a stop text does not reach over a call
            self._call, self._in_output = [], name == "<|output_start|>"
        elif self._call is not None and name == ("<|output_end|>" if self._in_output else "<|python_end|>"):
            parts.append(Part("python_output" if self._in_output else "python", self.tokenizer.decode(self._call)))
            self._call = None

    def _take_text(self, text: str, parts: list[Part]) -> None:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        keep = 0 if found else max((_overlap(text, stop) for stop in self._stop), default=0)
        shown = min(found, default=len(text) - keep)
        _add_text(parts, text[:shown])
        self._held = "" if found else text[shown:]
        if found:
            self.finish_reason, self._stopped = "stop", True

    def _flush(self, parts: list[Part]) -> None:
        """Nothing more belongs to what is held back."""
        if not self._stopped:
            self._take_text(self._bytes.decode(b"", final=True), parts)
            _add_text(parts, self._held)
            self._held = ""


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters may be the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _add_text(parts: list[Part], text: str) -> None:
    if text and parts and parts[-1].type == "text":
        parts[-1] = Part("text", parts[-1].text + text)
    elif text:
        parts.append(Part("text", text))


def plain_text(parts: Iterable[Part]) -> str:
    """An answer's text, without tool calls."""
    return "".join(part.text for part in parts if part.type == "text")


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbouring texts as one."""
    result: list[Part] = []
    for part in parts:
        if part.type == "text":
            _add_text(result, part.text)
        else:
            result.append(part)
    return result
