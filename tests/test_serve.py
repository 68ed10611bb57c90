"""The command: it serves a checkpoint, ends at SIGTERM with what runs complete, and says at once what cannot work.

Run: python -m pytest tests/test_serve.py
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from nanochat_jax import serve
from nanochat_jax.flags.serve import ServeConfig
from tests.support.commands import run_command
from tests.support.serving import events

ROOT = Path(__file__).parents[1]
run = functools.partial(run_command, serve.main, ServeConfig)
pytestmark = pytest.mark.usefixtures("in_base")


def test_sigterm_ends_the_server_when_what_runs_is_complete(tmp_path):
    command = [sys.executable, "-m", "nanochat_jax.serve", "-i", "base", "--port", "0", "--max-concurrent", "1"]
    environment = os.environ | {"NANOCHAT_API_KEY": "sesame"}
    with open(tmp_path / "err", "wb") as err:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, env=environment, text=True)
    try:
        line = server.stdout.readline()
        while line and "serving" not in line:
            line = server.stdout.readline()
        url = re.fullmatch(r"serving \S+ as 'd2-base' at (http://127\.0\.0\.1:\d+)\n", line)[1]
        body = {"prompt": "a", "max_tokens": 60, "stream": True, "temperature": 0, "logprobs": 0}
        assert httpx.post(url + "/v1/completions", json=body).status_code == 401
        asked = {"json": body, "headers": {"Authorization": "Bearer sesame"}, "timeout": 120}
        with httpx.stream("POST", url + "/v1/completions", **asked) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.send_signal(signal.SIGTERM)
            chunks = [json.loads(first.removeprefix("data: ")), *events(lines)]
        assert len(chunks) > 2 and chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert server.wait(60) == 0, (tmp_path / "err").read_text()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_what_cannot_work_is_said_before_a_model_is_read(monkeypatch):
    monkeypatch.setattr(serve.find, "find_model", lambda *_: pytest.fail("a model is looked for"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run("--port", taken.getsockname()[1])
    assert re.fullmatch(r"error: --host=127.0.0.1 --port=\d+ cannot be listened at \(.*\): choose another", said)
    assert run("--host", "no.such.place.invalid").startswith(
        "error: --host=no.such.place.invalid --port=8000 cannot be"
    )
    assert run("--api-key", "").startswith("error: --api-key, or NANOCHAT_API_KEY where it is not given, must not be e")
    assert run("--port", 70000) == "error: --port must be a port from 0 to 65535, got 70000"
    assert run("--max-concurrent", 0) == "error: --max-concurrent must be at least 1, got 0"
    assert run("--temperature", 3).startswith("error: --temperature must be at most 2")
    assert run("--top-p", 1.5).startswith("error: --top-p must be a number from 0 to 1")
