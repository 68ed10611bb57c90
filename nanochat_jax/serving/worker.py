"""The one thread that owns the engine: jobs come from any thread, and what they get is delivered as it comes.

Jobs join and leave the running decoding between two device calls. How many there may be is bounded: who comes when the
queue is full is told so at once.
"""

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import SampleInProgress
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.scoring import Scorer, Scores

ENDED = "the engine has stopped"
WARM_UP = 1, 4, 16  # prompts that are prefilled together: each number is a program


class Overloaded(Exception):
    """There are as many jobs as may be."""


class Progress(NamedTuple):
    """What a device call has added to an answer."""

    tokens: list[int]
    sampled: list[int]  # 1 where the model drew the token, 0 where a tool's result was put in
    logprobs: list[float]  # under the model's own distribution
    alternatives: list[tuple[np.ndarray, np.ndarray]]  # for each token the likeliest ids and theirs; [] if not wanted
    finished: bool


class Failure(NamedTuple):
    """Why a job has ended without a result."""

    message: str


@dataclass(frozen=True, eq=False)
class GenerationJob:
    """A prompt to be continued once. choice: the answer's number among those to the same prompt, for the draws."""

    ids: np.ndarray  # int32 [length], as `Engine.check_prompt` demands
    sampling: SamplingParams
    seed: int
    choice: int
    alternatives: bool  # whether the likeliest tokens are wanted
    deliver: Callable[[Progress | Failure], None]  # is called from the worker's thread, and must not wait


@dataclass(frozen=True, eq=False)
class ScoringJob:
    """A text whose tokens' log-probabilities are wanted."""

    ids: np.ndarray  # int32 [length]
    deliver: Callable[[Scores | Failure], None]  # as of GenerationJob


Job = GenerationJob | ScoringJob


class EngineWorker:
    """Works off jobs in a thread, from `start` to `stop`."""

    def __init__(self, engine: Engine, params: Any, *, max_waiting: int):
        """max_waiting: jobs that may wait beside those that have a slot. ValueError: the slots do not fit."""
        self.engine, self._params = engine, engine.cast_params(params)
        self.capacity = engine.slots + max_waiting
        self.running = 0  # jobs in slots
        self._score = Scorer(engine, engine.programs.alternatives)
        self._scheduler = engine.open_schedule(self._params)
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._open: set[Job] = set()  # accepted and not over
        self._ended = False
        self._lock = threading.Lock()  # of the two
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def open_jobs(self) -> int:
        """Jobs that wait or run."""
        return len(self._open)

    @property
    def alive(self) -> bool:
        """Whether jobs will be worked off."""
        return self._thread.is_alive()

    def warm_up(self) -> None:
        """Compile what most jobs need; before `start`."""
        sampling = SamplingParams(max_new_tokens=2 * self.engine.programs.chunk)
        ids = np.full(2, self.engine.tokenizer.bos, np.int32)
        for count in WARM_UP:
            for _ in range(min(count, self.engine.slots)):
                self._scheduler.add(ids, sampling, seed=0)
            while self._scheduler.advance():
                pass

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; jobs that are not over get a Failure."""
        self._commands.put(("stop", None))
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Accept all the jobs or none. Overloaded: there is no room for them now. When the thread has ended they get a
        Failure."""
        with self._lock:
            if len(self._open) + len(jobs) > self.capacity:
                raise Overloaded
            self._open.update(jobs)
            ended = self._ended
        if ended:
            return self._fail(jobs, ENDED)
        for job in jobs:
            self._commands.put(("add", job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget jobs, also where they are over already: their slots are free."""
        for job in jobs:
            self._commands.put(("cancel", job))

    # ---------------------------------------------------------------------------------------------- the thread's side
    def _run(self) -> None:
        try:
            self._work()
        finally:
            with self._lock:
                self._ended = True
            self._fail(list(self._open), ENDED)

    def _work(self) -> None:
        numbers: dict[Job, int] = {}  # of generation jobs in the scheduler
        running: dict[int, _Running] = {}  # by number
        scoring: dict[Job, None] = {}  # those that wait, in order
        idle = True
        while True:
            for what, job in self._take_commands(wait=idle):
                if what == "stop":
                    return
                if what == "add" and isinstance(job, ScoringJob):
                    scoring[job] = None
                elif what == "add":
                    number = self._scheduler.add(
                        job.ids, job.sampling, seed=job.seed, example=job.choice, alternatives=job.alternatives
                    )
                    numbers[job], running[number] = number, _Running(job)
                else:
                    scoring.pop(job, None)
                    if job in numbers:
                        number = numbers.pop(job)
                        del running[number]
                        self._scheduler.cancel(number)
                    self._close(job)
            try:
                for job in list(scoring)[:1]:  # one between two device calls, so that answers go on
                    scores = self._score(self._params, job.ids)
                    if not np.isfinite(scores.logprobs).all():
                        raise FloatingPointError("the model's logits are not finite: go back to an earlier checkpoint")
                    del scoring[job]
                    self._close(job)
                    self._deliver(job, scores)
                active = self._scheduler.advance()
                for sample in active:
                    job, progress = running[sample.prompt].job, running[sample.prompt].take(sample)
                    if sample.finished:
                        del running[sample.prompt], numbers[job]
                        self._close(job)
                    if progress.tokens:  # else it waits for a tool
                        self._deliver(job, progress)
                idle = not (active or scoring)
                self.running = self._scheduler.running
            except Exception as e:  # a model that is broken, memory that is full: who waits is told, and others may try
                traceback.print_exc(file=sys.stderr)
                self._fail([*numbers, *scoring], str(e)[:500])
                numbers, running, scoring, idle = {}, {}, {}, True
                self._scheduler.close()
                self._scheduler = None  # its caches go before the new ones come
                self._scheduler = self.engine.open_schedule(self._params)

    def _take_commands(self, wait: bool) -> list[tuple[str, Job | None]]:
        commands = [self._commands.get()] if wait else []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def _close(self, job: Job) -> None:
        with self._lock:
            self._open.discard(job)

    def _fail(self, jobs: Sequence[Job], message: str) -> None:
        for job in jobs:
            self._close(job)
            self._deliver(job, Failure(message))

    def _deliver(self, job: Job, what: Progress | Scores | Failure) -> None:
        try:
            job.deliver(what)
        except RuntimeError:  # the loop that waited for it has ended
            self.cancel([job])


@dataclass
class _Running:
    """A job in the scheduler."""

    job: GenerationJob
    shown: int = 0  # tokens that were delivered

    def take(self, sample: SampleInProgress) -> Progress:
        """What is new in the job's sample."""
        new, self.shown = slice(self.shown, None), len(sample.tokens)
        return Progress(
            sample.tokens[new],
            sample.mask[new],
            sample.policy_logprobs[new],
            sample.alternatives[new],
            sample.finished,
        )
