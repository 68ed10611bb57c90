"""Bodies become requests, or errors that name the field.

Run: python -m pytest tests/serving/test_requests.py
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.serving.requests import Limits, RequestError, read_chat, read_completion, read_json

LIMITS = Limits(messages=6, message_chars=100, total_chars=150, jobs=8, sampling=SamplingParams(0.8, 50, 16, 0.9))
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def chat(*messages, **fields):
    return read_chat({"messages": list(messages or [USER]), **fields}, "m", LIMITS)


def test_what_is_not_said_is_the_servers_default():
    options = chat().options
    assert options.sampling == SamplingParams(0.8, 50, 16, 0.9) and 0 <= options.seed < 2**32
    assert (options.n, options.stop, options.alternatives, options.stream) == (1, (), None, False)
    assert chat().options.seed != chat().options.seed


def test_what_is_said_holds():
    request = chat(model="m", temperature=0, top_p=0.5, top_k=7, max_tokens=3, stop="x", seed=-1, n=2, stream=True)
    assert request.options.sampling == SamplingParams(0.0, 7, 3, 0.5)
    assert (request.options.n, request.options.stop, request.options.seed) == (2, ("x",), 2**32 - 1)
    assert chat(max_tokens=3, max_completion_tokens=5).options.sampling.max_new_tokens == 5
    assert chat(top_k=-1).options.sampling.top_k == 0
    assert chat(logprobs=True, top_logprobs=4).options.alternatives == 4
    assert chat(logprobs=True).options.alternatives == 0
    assert chat(stream=True, stream_options={"include_usage": True}).options.include_usage
    assert chat(temperature=None, stop=None, n=None, tools=[], logit_bias={}, frequency_penalty=0) is not None


def test_contents_are_texts_or_parts_and_system_messages_become_one():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2", "more": 1}]
    system, developer = {"role": "system", "content": "Be kind."}, {"role": "developer", "content": parts}
    request = chat(system, developer, USER, {"role": "assistant", "content": call}, {"role": "user", "content": parts})
    assert request.messages == (
        {"role": "system", "content": "Be kind.\n\nab"},
        USER,
        {"role": "assistant", "content": [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]},
        {"role": "user", "content": "ab"},
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({"temperature": x}, "temperature") for x in (-0.1, 2.1, float("nan"), float("inf"), True, "1", [], 10**400)),
        *(({"top_p": x}, "top_p") for x in (-1, 1.5, "x")),
        *(({"top_k": x}, "top_k") for x in (-2, 1.0, 2**31, False)),
        *(({"max_tokens": x}, "max_tokens") for x in (0, -1, 1.5, 2**40)),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        *(({"stop": x}, "stop") for x in ("", ["a"] * 17, [1], {}, ["a", ""], "x" * 257)),
        *(({"n": x}, "n") for x in (0, 9, 129, "2")),
        *(({"seed": x}, "seed") for x in (2**63, 1.5, "a")),
        *(({"stream": x}, "stream") for x in (1, "true")),
        *(({"stream_options": x}, "stream_options") for x in ([], {"include_usage": True})),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        *(({"logprobs": x}, "logprobs") for x in (1, "yes")),
        *(({"top_logprobs": x}, "top_logprobs") for x in (21, -1, 3)),
        *(({name: 0.5}, name) for name in ("frequency_penalty", "presence_penalty")),
        *(({name: [1]}, name) for name in ("tools", "functions", "logit_bias")),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        *(({"model": x}, "model") for x in (3, None, [], "other", "\ud800")),
        *(({"messages": x}, "messages") for x in (None, [], {}, "Hi", [USER] * 7, [ASSISTANT], [USER, ASSISTANT])),
        *(({"messages": [x]}, "messages[0]") for x in (None, "Hi", [])),
        *(({"messages": [{"role": x, "content": "a"}]}, "messages[0].role") for x in ("tool", None, [], {})),
        *(({"messages": [{"role": "user", "content": x}]}, "messages[0].content") for x in (None, 3, {}, [1], [{}])),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "a"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 90}, ASSISTANT, {**USER, "content": "x" * 90}]}, "messages"),
        ({"messages": [USER, {"role": "system", "content": "a"}, USER]}, "messages"),
        ({"messages": [USER, USER]}, "messages"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_with_the_fields_name(fields, param):
    with pytest.raises(RequestError) as error:
        read_chat({"messages": [USER]} | fields, "m", LIMITS)
    assert error.value.param == param and error.value.status == (404 if error.value.code == "model_not_found" else 400)
    assert param.split("[")[0].split(".")[0] in error.value.message or "conversation" in error.value.message


def completion(prompt, **fields):
    return read_completion({"prompt": prompt, **fields}, "m", LIMITS)


def test_prompts_are_texts_or_ids_one_or_many():
    assert completion("ab").prompts == ("ab",) and completion(["a", "b"]).prompts == ("a", "b")
    assert completion([1, 2]).prompts == ((1, 2),) and completion([[1], [2, 3]]).prompts == ((1,), (2, 3))
    request = completion("ab", echo=True, max_tokens=0, logprobs=2)
    assert (request.echo, request.generate, request.options.alternatives) == (True, False, 2)
    for bad in (None, [], [[]], [1, "a"], [[1], 2], [-1], [True], [1.5], {}, "x" * 151, [2**31]):
        with pytest.raises(RequestError, match="prompt"):
            completion(bad)
    for fields in ({"max_tokens": 0}, {"logprobs": True}, {"best_of": 2}, {"suffix": "x"}, {"n": 5}):
        with pytest.raises(RequestError, match=next(iter(fields))):
            completion(["a", "b"], **fields)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(RequestError, match="the body must be"):
        read_json(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["messages", "prompt", "model", "temperature", "stop", "n", "logprobs", "stream_options", "seed"]
)


@given(fields=st.dictionaries(NAMES, JSON, max_size=4), good=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_a_request_or_an_error_that_can_be_sent(fields, good):
    for read, start in ((read_chat, {"messages": [USER]}), (read_completion, {"prompt": "a"})):
        try:
            read((start if good else {}) | fields, "m", LIMITS)
        except RequestError as refused:
            error = json.loads(json.dumps(refused.body()))["error"]
        else:
            continue
        assert error["message"]
