"""A server in this process, on a free port of the loopback, and a model whose words are written."""

import contextlib
import json
import threading
import time
from types import SimpleNamespace

from nanochat_jax.inference.samples import ControlTokens
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.serving import http
from nanochat_jax.serving.app import ServerSettings, make_app
from nanochat_jax.serving.requests import Limits
from nanochat_jax.serving.worker import Overloaded, Progress
from tests.support import tiny

TOKENIZER = tiny.tokenizer()  # of bytes
END = TOKENIZER.special("<|assistant_end|>")
LIMITS = Limits(500, 8000, 32000, jobs=160, sampling=SamplingParams(0.8, 50, 500))


def serving(worker, limits=LIMITS, **settings):
    """Gives http://127.0.0.1:<port> of a server with this worker."""
    settings = ServerSettings(**({"model": "tiny", "limits": limits, "body_bytes": 1 << 16} | settings))
    return http.serving(make_app(worker, settings))


def call(expression, result):
    """(token, sampled) pairs of a calculator call."""
    names = ("python_start", "python_end", "output_start", "output_end")
    start, end, output, output_end = (TOKENIZER.special(f"<|{name}|>") for name in names)
    drawn = [start, *TOKENIZER.encode(expression), end]
    forced = [output, *TOKENIZER.encode(result), output_end]
    return [(token, 1) for token in drawn] + [(token, 0) for token in forced]


def said(text, ended=True):
    """(token, sampled) pairs of a text."""
    return [(token, 1) for token in [*TOKENIZER.encode(text), *[END] * ended]]


class ScriptedWorker:
    """In a worker's place: every job gets the pairs of `script`, `step` at a time, with a pause after each."""

    alive, running = True, 0

    def __init__(self, script, *, step=4, pause=0.0, capacity=1000, context=2000):
        self.script, self.step, self.pause, self.capacity = script, step, pause, capacity
        self.engine = SimpleNamespace(
            tokenizer=TOKENIZER, control_tokens=ControlTokens(TOKENIZER), context=context, slots=8, compiles=0
        )
        self.jobs, self.cancelled, self._open = [], set(), set()

    @property
    def open_jobs(self):
        return len(self._open)

    def submit(self, jobs):
        if len(self._open) + len(jobs) > self.capacity:
            raise Overloaded
        self._open.update(jobs)
        self.jobs += jobs
        for job in jobs:
            threading.Thread(target=self._work, args=(job,), daemon=True).start()

    def cancel(self, jobs):
        self.cancelled.update(jobs)
        self._open.difference_update(jobs)

    def _work(self, job):
        pairs = self.script[: job.sampling.max_new_tokens]
        for at in range(0, len(pairs), self.step):
            if job in self.cancelled:
                return
            tokens, sampled = map(list, zip(*pairs[at : at + self.step]))
            finished = at + self.step >= len(pairs)
            if finished:
                self._open.discard(job)
            with contextlib.suppress(RuntimeError):  # the server has ended
                job.deliver(Progress(tokens, sampled, [-1.0] * len(tokens), [], finished))
            time.sleep(self.pause)


def events(lines):
    """The JSON objects of a stream's lines, up to [DONE]."""
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]
