"""One request's way through the worker: its jobs, what they deliver, and the answers that come of it."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_jax.inference.scoring import Scores
from nanochat_jax.serving.choice import Choice, Delta, Part, TokenScore, token_score
from nanochat_jax.serving.metrics import Metrics
from nanochat_jax.serving.requests import Options, RequestError
from nanochat_jax.serving.responses import Collected, Usage
from nanochat_jax.serving.worker import EngineWorker, Failure, GenerationJob, Job, Overloaded, Progress, ScoringJob


@dataclass(frozen=True)
class Prompt:
    """A prompt as it goes to the engine, and as `echo` gives it back."""

    ids: np.ndarray  # int32 [length]
    text: str = ""
    hidden: int = 0  # ids at the beginning that are no part of the text


class Answering:
    """The answers to a request, from `submit` to the last of `deltas`, or to `cancel`."""

    def __init__(
        self,
        worker: EngineWorker,
        metrics: Metrics,
        prompts: Sequence[Prompt],
        options: Options,
        *,
        echo: bool = False,
        generate: bool = True,
    ):
        """echo: an answer begins with its prompt. generate: whether anything comes after it."""
        self._worker, self._metrics, self._prompts, self._options = worker, metrics, prompts, options
        self._echo, self._generate, self._began = echo, generate, time.perf_counter()
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self.count = len(prompts) * options.n  # of answers
        with_scores = options.alternatives is not None
        generations = [
            GenerationJob(prompt.ids, options.sampling, options.seed, number, with_scores, self._deliver(i))
            for i, (prompt, number) in enumerate(itertools.product(prompts, range(options.n)))
        ]
        scorings = [ScoringJob(prompt.ids, self._deliver(self.count + p)) for p, prompt in enumerate(prompts)]
        self._open: dict[int, Job] = dict(enumerate(generations)) if generate else {}  # not over yet
        if echo and with_scores:
            self._open |= dict(enumerate(scorings, self.count))
        engine = worker.engine
        self._choices = [
            Choice(engine.tokenizer, engine.control_tokens.ends, options.stop, options.alternatives)
            for _ in range(self.count)
        ]

    def submit(self) -> None:
        """Give the jobs to the worker. RequestError: it has too many."""
        try:
            self._worker.submit(list(self._open.values()))
        except Overloaded:
            self._open.clear()
            said = f"the server is busy with {self._worker.open_jobs} answers: try again later"
            raise RequestError(said, code="rate_limit_exceeded", status=429) from None
        self._metrics.prompt_tokens += self.usage().prompt

    def cancel(self) -> bool:
        """Give up what is not over yet -> whether there was something."""
        given_up = list(self._open.values())
        self._worker.cancel(given_up)
        self._open.clear()
        return bool(given_up)

    def usage(self) -> Usage:
        """The tokens so far; a prompt counts once."""
        return Usage(sum(len(prompt.ids) for prompt in self._prompts), sum(choice.tokens for choice in self._choices))

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answers as they come. RequestError: the engine has failed."""
        early = []  # what comes before the prompts' scores, which an answer with echo begins with
        scores: dict[int, Scores] = {}
        while any(index >= self.count for index in self._open):
            index, what = await self._next()
            if index >= self.count:
                del self._open[index]
                scores[index - self.count] = what
            else:
                early.append((index, what))
        if self._echo:
            for index in range(self.count):
                p = index // self._options.n
                of_prompt = self._prompt_scores(self._prompts[p], scores[p]) if p in scores else []
                parts = [Part("text", self._prompts[p].text)]
                yield Delta(index, parts, of_prompt, None if self._generate else "length")
        for index, progress in early:
            yield self._take(index, progress)
        while self._open:
            index, progress = await self._next()
            if index in self._open:  # else a stop text has ended it
                yield self._take(index, progress)

    async def collect(self) -> list[Collected]:
        """The whole answers."""
        collected = [Collected() for _ in range(self.count)]
        async for delta in self.deltas():
            collected[delta.index].add(delta)
        return collected

    def _deliver(self, index: int) -> Callable[[Any], None]:
        """How a job delivers, from the worker's thread."""
        return lambda what: self._loop.call_soon_threadsafe(self._events.put_nowait, (index, what))

    async def _next(self) -> tuple[int, Progress | Scores]:
        index, what = await self._events.get()
        if isinstance(what, Failure):
            raise RequestError(what.message, status=500)
        return index, what

    def _take(self, index: int, progress: Progress) -> Delta:
        choice = self._choices[index]
        if self.usage().completion == 0:
            self._metrics.first_tokens += 1
            self._metrics.first_token_seconds += time.perf_counter() - self._began
        before = choice.tokens
        parts, scores = choice.take(progress)
        self._metrics.completion_tokens += choice.tokens - before
        if choice.finish_reason:
            job = self._open.pop(index)
            if not progress.finished:
                self._worker.cancel([job])
        return Delta(index, parts, scores, choice.finish_reason)

    def _prompt_scores(self, prompt: Prompt, scores: Scores) -> list[TokenScore]:
        count = self._options.alternatives
        first = [] if prompt.hidden else [TokenScore(int(prompt.ids[0]), None, ())]
        rows = zip(prompt.ids[1:].tolist(), scores.logprobs.tolist(), scores.likeliest, scores.likeliest_logprobs)
        return first + [token_score(token, logprob, ids, theirs, count) for token, logprob, ids, theirs in rows]
