"""The server over HTTP, with a model whose words are written: forms of answers, errors, keys, streams, who goes away.

Run: python -m pytest tests/serving/test_app.py
"""

import json
import socket
import time

import httpx
import pytest

from nanochat_jax.serving.http import PatientProtocol
from tests.support.serving import LIMITS, TOKENIZER, ScriptedWorker, call, events, said, serving

HI = [{"role": "user", "content": "Hi"}]
SCRIPT = said("It is ", False) + call("2*21", "42") + said("42€.")


@pytest.fixture(scope="module")
def worker():
    return ScriptedWorker(SCRIPT)


@pytest.fixture(scope="module")
def client(worker):
    with serving(worker) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def chat(client, **fields):
    body = json.dumps({"messages": HI, "max_tokens": 100} | fields)  # in ASCII, also where a text is no UTF-8
    return client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})


def wait_until(holds):
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_chat_is_answered_in_openais_form(client):
    answer = chat(client, model="tiny").json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "It is 42€.")
    assert [part["type"] for part in choice["message"]["parts"]] == ["text", "python", "python_output", "text"]
    size = len(SCRIPT)
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": size, "total_tokens": 6 + size}


def test_the_answer_with_its_calls_may_be_sent_back(client, worker):
    parts = chat(client).json()["choices"][0]["message"]["parts"]
    again = chat(client, messages=[*HI, {"role": "assistant", "content": parts}, *HI])
    assert again.status_code == 200
    assert [*worker.jobs[-1].ids][6 : 6 + len(SCRIPT)] == [token for token, _ in SCRIPT]


def test_users_text_never_becomes_a_special_token(client, worker):
    chat(client, messages=[{"role": "user", "content": "<|assistant_start|><|bos|>"}])
    ids = worker.jobs[-1].ids.tolist()
    assert bytes(ids[2:-2]) == b"<|assistant_start|><|bos|>" and min(ids[:2] + ids[-2:]) > 255


def test_a_stream_is_the_same_answer_in_pieces(client):
    for n in (1, 2):
        with client.stream(
            "POST",
            "/v1/chat/completions",
            json={"messages": HI, "stream": True, "n": n, "max_tokens": 100, "stream_options": {"include_usage": True}},
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, last = events(response.iter_lines())
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == n * len(SCRIPT)
        for index in range(n):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["finish_reason"] == "stop"
            assert "".join(choice["delta"].get("content", "") for choice in mine) == "It is 42€."
            parts = [part for choice in mine for part in choice["delta"].get("parts", [])]
            assert parts == [{"type": "python", "text": "2*21"}, {"type": "python_output", "text": "42"}]


def test_a_stop_text_ends_answer_and_job(client, worker):
    worker.pause = 0.05
    try:
        (choice,) = chat(client, stop=[" i", "?"]).json()["choices"]
    finally:
        worker.pause = 0.0
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It", "stop")
    assert worker.jobs[-1] in worker.cancelled and worker.open_jobs == 0
    assert chat(client, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"


def test_completions_go_on_with_texts_and_ids(client, worker):
    body = {"prompt": ["ab", "c"], "n": 2, "echo": True, "max_tokens": 6}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == ["abIt is "] * 2 + ["cIt is "] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [job.choice for job in worker.jobs[-4:]] == [0, 1, 0, 1]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}  # bos counts
    answer = client.post("/v1/completions", json={"prompt": [97, 98], "echo": True, "max_tokens": 0}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("ab", "length")
    with client.stream("POST", "/v1/completions", json={"prompt": "ab", "stream": True, "max_tokens": 6}) as response:
        chunks = events(response.iter_lines())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "It is "


def test_a_prompt_begins_with_bos_once(client, worker):
    bos = TOKENIZER.bos
    for prompt in ("ab", [97, 98], [bos, 97, 98]):
        body = {"prompt": prompt, "echo": True, "max_tokens": 2, "temperature": 0}
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert choice["text"] == ("<|bos|>abIt" if prompt[0] == bos else "abIt")
        assert worker.jobs[-1].ids.tolist() == [bos, 97, 98]


def test_texts_become_ids_and_back_as_lm_evaluation_harness_asks_for_it(client):
    info = client.get("/tokenizer_info").json()

    def ids(text, **fields):
        return client.post("/tokenize", json={"prompt": text} | fields).json()["tokens"]

    assert ids(info["eos_token"], add_special_tokens=False) == [TOKENIZER.bos]
    assert ids("a<|bos|>", add_special_tokens=False) == [*b"a<|bos|>"] and ids("a") == [TOKENIZER.bos, 97]
    assert client.post("/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}
    for path, body in (("/tokenize", {"prompt": 3}), ("/detokenize", {"tokens": [265]}), ("/detokenize", {})):
        assert client.post(path, json=body).status_code == 400


def test_the_model_is_listed(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 2000
    assert client.get("/v1/models/tin").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_errors_have_openais_form_and_the_right_status(client):
    for status, code, answer in (
        (400, None, chat(client, temperature=3)),
        (404, "model_not_found", chat(client, model="gpt-4")),
        (400, "context_length_exceeded", chat(client, messages=[{"role": "user", "content": "x" * 1996}])),
        (400, None, chat(client, messages=[{"role": "user", "content": "x" * 8001}])),
        (413, None, client.post("/v1/completions", json={"prompt": "x" * 70_000})),
        (415, None, client.post("/v1/completions", content='{"prompt": "a"}')),
        (400, None, client.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})),
        (400, None, client.post("/v1/completions", json={"prompt": [265]})),
        (404, None, client.get("/v1/nothing")),
        (405, None, client.get("/v1/completions")),
        (405, None, client.post("/health")),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), error
        assert {*error} == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_names_of_other_places_and_odd_characters_are_refused_and_no_fault(client):
    assert chat(client, model="\ud800").status_code == 404
    assert chat(client, messages=[{"role": "user", "content": "\ud800"}]).status_code == 200
    assert chat(client, stop="\udfff").status_code == 200
    assert client.get("/v1/models/%ff%00").status_code == 404


def test_the_key_is_asked_for_where_there_is_one():
    with serving(ScriptedWorker(SCRIPT), api_key="sesamé") as url, httpx.Client(base_url=url) as client:
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesamé".encode()}):
            refused = client.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert client.post("/v1/chat/completions", headers=headers, json={"messages": HI}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer sesamé".encode()}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_pages_from_elsewhere_may_ask_only_where_they_are_named():
    origin = {"Origin": "https://example.org"}
    with serving(ScriptedWorker(SCRIPT), cors=("https://example.org",), hosts=("127.0.0.1",)) as url:
        assert httpx.get(url + "/health", headers=origin).headers["access-control-allow-origin"] == origin["Origin"]
        assert (
            "access-control-allow-origin" not in httpx.get(url + "/health", headers={"Origin": "https://b.org"}).headers
        )
        assert httpx.get(url + "/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_who_comes_when_the_queue_is_full_is_sent_away():
    worker = ScriptedWorker(SCRIPT, capacity=2)
    with serving(worker) as url, httpx.Client(base_url=url) as client:
        answer = chat(client, n=3)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded" and worker.jobs == []
        assert chat(client, n=2).status_code == 200
    with serving(worker, LIMITS) as url:
        assert httpx.post(url + "/v1/completions", json={"prompt": ["a"] * 161}).status_code == 400  # can never be


@pytest.mark.parametrize("stream", [False, True])
def test_jobs_of_a_client_that_goes_away_are_given_up(stream):
    worker = ScriptedWorker(said("x" * 5000), step=1, pause=0.02, capacity=8)
    with serving(worker) as url:
        port = int(url.rsplit(":", 1)[1])
        body = json.dumps({"messages": HI, "stream": stream, "n": 2, "max_tokens": 5000}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: worker.open_jobs == 2)
        wait_until(lambda: worker.open_jobs == 0)
        assert "nanochat_cancelled_total 1\n" in httpx.get(url + "/metrics").text
        with socket.create_connection(("127.0.0.1", port)) as connection:  # in the middle of a body
            connection.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        assert httpx.get(url + "/health").status_code == 200


def test_a_connection_on_which_nothing_is_asked_is_closed(monkeypatch, worker):
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.1)
    with serving(worker) as url:
        for said in (b"", b"POST /v1/comp"):
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as connection:
                connection.sendall(said)
                assert connection.recv(100) == b""


def test_a_body_that_does_not_come_is_not_waited_for(worker):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with serving(worker, body_seconds=0.1) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_the_metrics_count_answers_and_tokens(client):
    def metrics():
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = metrics()
    chat(client)
    chat(client, n=0)
    after = metrics()

    def gained(name):
        return after[name] - before.get(name, 0)

    path = 'nanochat_requests_total{path="/v1/chat/completions",status='
    assert gained(path + '"200"}') == gained(path + '"400"}') == gained("nanochat_first_token_seconds_count") == 1
    assert gained("nanochat_completion_tokens_total") == len(SCRIPT) and gained("nanochat_prompt_tokens_total") == 6
    assert after["nanochat_jobs_open"] == 0 and after["nanochat_slots"] == 8
