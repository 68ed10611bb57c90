"""The JSON of answers, as OpenAI's clients read it: whole, or as the chunks of a stream."""

import collections
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat_jax.serving.choice import Delta, Part, TokenScore, merged, plain_text
from nanochat_jax.tokenizer import Tokenizer


@dataclass
class Collected:
    """An answer as far as it has come."""

    parts: list[Part] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """What is new."""
        self.parts += delta.parts
        self.scores += delta.scores
        self.finish_reason = delta.finish_reason


@dataclass(frozen=True)
class Usage:
    """Counts of tokens."""

    prompt: int
    completion: int

    def body(self) -> dict:
        """As JSON."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class ChatFormat:
    """Of /v1/chat/completions. An answer with tool calls has `parts` beside its content, in the form in which a
    later request may hold them: [{"type": "text", "python" or "python_output", "text": ...}]."""

    def __init__(self, tokenizer: Tokenizer, model: str, with_logprobs: bool):
        self.tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self._head = _head("chatcmpl", model)

    def whole(self, choices: Sequence[Collected], usage: Usage) -> dict:
        """The body of an answer that is not streamed."""
        listed = []
        for i, choice in enumerate(choices):
            parts = merged(choice.parts)
            message = {"role": "assistant", "content": plain_text(parts), "refusal": None} | _calls(parts)
            listed.append({"index": i, "message": message} | self._end(choice.scores, choice.finish_reason))
        return self._head | {"object": "chat.completion", "choices": listed, "usage": usage.body()}

    def begin(self, index: int) -> list[dict]:
        """The first chunk of a choice."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, [], None)]

    def chunks(self, delta: Delta) -> list[dict]:
        """New parts of a choice in order, and its end."""
        changes = [{"content": part.text} if part.type == "text" else _calls([part]) for part in delta.parts]
        if delta.scores and not changes:
            changes = [{"content": ""}]
        made = [self._chunk(delta.index, change, [] if i else delta.scores, None) for i, change in enumerate(changes)]
        if delta.finish_reason:
            made.append(self._chunk(delta.index, {}, [], delta.finish_reason))
        return made

    def usage_chunk(self, usage: Usage) -> dict:
        """The last chunk, for who has asked for it."""
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage.body()}

    def _chunk(self, index: int, delta: dict, scores: list[TokenScore], finish_reason: str | None) -> dict:
        choice = {"index": index, "delta": delta} | self._end(scores, finish_reason)
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _end(self, scores: list[TokenScore], finish_reason: str | None) -> dict:
        logprobs = None
        if self._with_logprobs and (scores or finish_reason):
            logprobs = {"content": [self._scored(score) for score in scores], "refusal": None}
        return {"logprobs": logprobs, "finish_reason": finish_reason}

    def _scored(self, score: TokenScore) -> dict:
        def entry(token: int, logprob: float) -> dict:
            as_bytes = self.tokenizer.decode_bytes([token])
            return {"token": as_bytes.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(as_bytes)}

        others = [entry(token, logprob) for token, logprob in score.alternatives]
        return entry(score.token, score.logprob) | {"top_logprobs": others}


class CompletionFormat:
    """Of /v1/completions."""

    def __init__(self, tokenizer: Tokenizer, model: str, with_logprobs: bool):
        self.tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self._head = _head("cmpl", model) | {"object": "text_completion"}
        self._offsets: collections.Counter[int] = collections.Counter()  # of each choice: characters that were sent

    def whole(self, choices: Sequence[Collected], usage: Usage) -> dict:
        """The body of an answer that is not streamed."""
        listed = [
            self._choice(i, choice.parts, choice.scores, choice.finish_reason, 0) for i, choice in enumerate(choices)
        ]
        return self._head | {"choices": listed, "usage": usage.body()}

    def begin(self, index: int) -> list[dict]:
        """A choice has no chunk before its first text."""
        return []

    def chunks(self, delta: Delta) -> list[dict]:
        """The new text of a choice, with its end."""
        if not (delta.parts or delta.scores or delta.finish_reason):
            return []
        offset = self._offsets[delta.index]
        self._offsets[delta.index] += sum(len(self._name(score.token)) for score in delta.scores)
        choice = self._choice(delta.index, delta.parts, delta.scores, delta.finish_reason, offset)
        return [self._head | {"choices": [choice]}]

    def usage_chunk(self, usage: Usage) -> dict:
        """The last chunk, for who has asked for it."""
        return self._head | {"choices": [], "usage": usage.body()}

    def _choice(self, index, parts, scores, finish_reason, offset) -> dict:
        logprobs = None
        if self._with_logprobs:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for score in scores:
                name = self._name(score.token)
                likeliest = {self._name(token): logprob for token, logprob in score.alternatives}
                likeliest.setdefault(name, score.logprob)
                logprobs["tokens"].append(name)
                logprobs["token_logprobs"].append(score.logprob)
                logprobs["top_logprobs"].append(None if score.logprob is None else likeliest)
                logprobs["text_offset"].append(offset)
                offset += len(name)
        return {"index": index, "text": plain_text(parts), "logprobs": logprobs, "finish_reason": finish_reason}

    def _name(self, token: int) -> str:
        """A token's text; bytes that are no text by themselves are written out, so that no two tokens have one name."""
        as_bytes = self.tokenizer.decode_bytes([token])
        try:
            return as_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in as_bytes)


def _head(prefix: str, model: str) -> dict:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _calls(parts: Sequence[Part]) -> dict:
    """The field `parts` of a message or a delta, where a tool call is among them."""
    if all(part.type == "text" for part in parts):
        return {}
    return {"parts": [part._asdict() for part in parts]}
