"""What a request asks for: the JSON of a body becomes a frozen dataclass, or an error with the fields of OpenAI's.

Functions of their arguments only. Field names and their meaning are those of OpenAI's reference of chat completions and
completions; `top_k` is added. What could not be honoured is refused, never ignored, where it would change an answer.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_jax.inference.sampling import SamplingParams

MOST_ALTERNATIVES = 20  # the likeliest tokens beside each token, as in OpenAI's interface
MOST_STOPS, MOST_STOP_CHARS = 16, 256  # OpenAI's interface has 4 of them
MOST_CHOICES = 128
Body = Mapping[str, Any]


class RequestError(Exception):
    """What is wrong with a request. status: of HTTP; param: the field; code: a word for programs."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at the most, and what holds where it does not say."""

    messages: int
    message_chars: int
    total_chars: int
    jobs: int  # answers to one request, its prompts together, and prompts whose log-probabilities are wanted
    sampling: SamplingParams  # of who does not say how to draw


@dataclass(frozen=True)
class Options:
    """How to answer."""

    sampling: SamplingParams  # its max_new_tokens may be more than fits into the context
    seed: int
    n: int  # answers to each prompt
    stop: tuple[str, ...]
    alternatives: int | None  # the likeliest tokens to be told beside each; None: no log-probabilities at all
    stream: bool
    include_usage: bool  # a stream's last chunk tells the counts of tokens


@dataclass(frozen=True)
class ChatRequest:
    """A conversation whose last message is the user's; messages are as `split_conversation` takes them."""

    options: Options
    messages: tuple[dict, ...]


@dataclass(frozen=True)
class CompletionRequest:
    """Prompts, texts or token ids, to be gone on with."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool  # the prompt is part of the answer
    generate: bool  # False: max_tokens is 0, only the prompt's log-probabilities are asked for


def read_json(body: bytes) -> Body:
    """A body's JSON object."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as e:
        said = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise RequestError(f"the body must be JSON: {said}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {_kind(value)}")
    return value


def read_chat(body: Body, model: str, limits: Limits) -> ChatRequest:
    """The body of /v1/chat/completions. RequestError says what is wrong with it. model: the name that is served."""
    _check_model(body, model)
    for name in ("tools", "functions"):
        _refuse(body, name, "the tools are those that the server was started with, and the model calls them by itself")
    response_format = body.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        raise RequestError("response_format must be text", param="response_format")
    messages = _messages(body, limits)
    wanted = _boolean(body, "logprobs", False)
    alternatives = _integer(body, "top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if alternatives and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    most = _integer(body, "max_completion_tokens", None, 1)
    if most is None:
        most = _integer(body, "max_tokens", limits.sampling.max_new_tokens, 1)
    options = _options(body, limits, most, alternatives if wanted else None, prompts=1, scored=0)
    return ChatRequest(options, messages)


def read_completion(body: Body, model: str, limits: Limits) -> CompletionRequest:
    """The body of /v1/completions; see `read_chat`."""
    _check_model(body, model)
    _refuse(body, "suffix", "text cannot be put between two texts")
    echo = _boolean(body, "echo", False)
    prompts = _prompts(body, limits)
    alternatives = _integer(body, "logprobs", None, 0, MOST_ALTERNATIVES)
    most = _integer(body, "max_tokens", limits.sampling.max_new_tokens, 0 if echo else 1)
    scored = len(prompts) if echo and alternatives is not None else 0
    options = _options(body, limits, max(most, 1), alternatives, prompts=len(prompts), scored=scored)
    if _integer(body, "best_of", options.n, 1) != options.n:
        raise RequestError("best_of must be n", param="best_of")
    return CompletionRequest(options, prompts, echo, generate=most > 0)


def _options(
    body: Body, limits: Limits, max_new_tokens: int, alternatives: int | None, prompts: int, scored: int
) -> Options:
    for name in ("frequency_penalty", "presence_penalty"):
        if _number(body, name, 0.0, -2, 2):
            raise RequestError(f"{name} must be 0: penalties are not supported", param=name)
    _refuse(body, "logit_bias", "it is not supported")
    n = _integer(body, "n", 1, 1, MOST_CHOICES)
    if (jobs := n * prompts + scored) > limits.jobs:
        said = f"a request may have at most {limits.jobs} answers, and prompts with log-probabilities, got {jobs}"
        raise RequestError(said, param="n")
    stream = _boolean(body, "stream", False)
    stream_options = body.get("stream_options")
    if stream_options is None:
        stream_options = {}
    if not isinstance(stream_options, dict):
        raise RequestError(f"stream_options must be an object, got {_kind(stream_options)}", param="stream_options")
    if stream_options and not stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    top_k = _integer(body, "top_k", limits.sampling.top_k, -1)
    sampling = SamplingParams(
        temperature=_number(body, "temperature", limits.sampling.temperature, 0, 2),
        top_k=max(top_k, 0),
        max_new_tokens=max_new_tokens,
        top_p=_number(body, "top_p", limits.sampling.top_p, 0, 1),
    )
    seed = _integer(body, "seed", None, -(2**63), 2**63 - 1)
    return Options(
        sampling=sampling,
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        n=n,
        stop=_stop(body),
        alternatives=alternatives,
        stream=stream,
        include_usage=_boolean(stream_options, "include_usage", False),
    )


# ------------------------------------------------------------------------------------------------ messages and prompts
def _messages(body: Body, limits: Limits) -> tuple[dict, ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    if len(messages) > limits.messages:
        raise RequestError(
            f"a conversation may have at most {limits.messages:,} messages, got {len(messages):,}", param="messages"
        )
    read = [_message(message, f"messages[{i}]", limits) for i, message in enumerate(messages)]
    total = sum(len(text) for _, texts, _ in read for text in texts)
    if total > limits.total_chars:
        raise RequestError(
            f"a conversation may have at most {limits.total_chars:,} characters, got {total:,}", param="messages"
        )
    system = [content for role, _, content in read if role == "system"]
    others = [{"role": role, "content": content} for role, _, content in read if role != "system"]
    if any(role == "system" for role, *_ in read[len(system) :]):
        raise RequestError("system messages must come first", param="messages")
    if not others or others[-1]["role"] != "user":
        raise RequestError("the last of messages must be the user's", param="messages")
    for i, message in enumerate(others):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise RequestError(
                "after the system's, messages must be the user's and the assistant's in turn, the user's first; "
                f"messages[{i + len(system)}] is not",
                param="messages",
            )
    return ({"role": "system", "content": "\n\n".join(system)}, *others) if system else tuple(others)


def _message(message: Any, name: str, limits: Limits) -> tuple[str, list[str], str | list[dict]]:
    """-> (role, its texts, content as training has it)"""
    if not isinstance(message, dict):
        raise RequestError(f"{name} must be an object, got {_kind(message)}", param=name)
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"{name}.role must be system, developer, user or assistant", param=f"{name}.role")
    content = message.get("content")
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        kinds = ("text", "python", "python_output") if role == "assistant" else ("text",)
        for k, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"{name}.content[{k}] must be an object with the type {' or '.join(kinds)} and a text",
                    param=f"{name}.content",
                )
        texts = [part["text"] for part in content]
        parts = [{"type": part["type"], "text": part["text"]} for part in content]
        content = parts if role == "assistant" else "".join(texts)
    else:
        raise RequestError(
            f"{name}.content must be a text or a list of parts, got {_kind(content)}", param=f"{name}.content"
        )
    if (size := sum(map(len, texts))) > limits.message_chars:
        raise RequestError(
            f"a message may have at most {limits.message_chars:,} characters, {name} has {size:,}",
            param=f"{name}.content",
        )
    return role, texts, content


def _prompts(body: Body, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of lists of them."""

    def is_ids(value) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(type(x) is int and 0 <= x < 2**31 for x in value)

    prompt = body.get("prompt")
    if isinstance(prompt, str) or is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError("prompt must be a text, a list of token ids, or a list of either", param="prompt")
    for one in prompt:
        if not (isinstance(one, str) or is_ids(one)):
            raise RequestError("prompt must hold texts, or lists of token ids of at least one", param="prompt")
    if (size := max((len(one) for one in prompt if isinstance(one, str)), default=0)) > limits.total_chars:
        raise RequestError(f"a prompt may have at most {limits.total_chars:,} characters, got {size:,}", param="prompt")
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)


# -------------------------------------------------------------------------------------------------------------- fields
def _check_model(body: Body, served: str) -> None:
    name = body.get("model", served)
    if not isinstance(name, str):
        raise RequestError(f"model must be a text, got {_kind(name)}", param="model")
    if name != served:
        raise RequestError(
            f"the model {name!r:.100} is not served, only {served!r}", param="model", code="model_not_found", status=404
        )


def _refuse(body: Body, name: str, why: str) -> None:
    """RequestError where a field that is not supported has a value."""
    if body.get(name):
        raise RequestError(f"{name} must be left out: {why}", param=name, code="unsupported_parameter")


def _boolean(body: Body, name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {_kind(value)}", param=name)
    return value


def _integer(body: Body, name: str, default: int | None, low: int, high: int = 2**31 - 1) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        rule = f"of at least {low}" if high == 2**31 - 1 else f"from {low} to {high}"
        raise RequestError(f"{name} must be an integer {rule}, got {_shown(value)}", param=name)
    return value


def _number(body: Body, name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low} to {high}, got {_shown(value)}", param=name)
    return float(value)


def _stop(body: Body) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MOST_STOP_CHARS for text in stops)
    ):
        raise RequestError(
            f"stop must be a text, or a list of up to {MOST_STOPS}, each of 1 to {MOST_STOP_CHARS} characters",
            param="stop",
        )
    return tuple(stops)


def _kind(value: Any) -> str:
    """What JSON calls a value's type."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A number as it is, of other values only what they are: texts may be long, and anything."""
    if type(value) is float:
        return f"{value:.6g}"
    return str(value) if type(value) is int and abs(value) < 10**20 else _kind(value)
