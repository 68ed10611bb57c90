"""Evaluate a model on tasks: how many of its answers are right.

Multiple choice: the offered letter with the largest logit after the prompt, the first of equals, without generating.
Every other task: a text is generated, with tools, and `task.evaluate` judges it. Facts of nanochat, 2026: its
five tasks and their baselines, the test splits, 512 new tokens, greedy. Until 2026-07 SpellingBee was the sixth task.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.signals import collect
from nanochat_jax.evals.eval_set import EvalSet, judge, replies
from nanochat_jax.evals.intervals import Share, pass_at_k
from nanochat_jax.evals.multiple_choice import make_letter_logits
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import turns_of
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import CALCULATOR_ALONE, Toolbox
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tasks import HumanEval

JUDGES = min(8, os.cpu_count() or 1)  # programs run at once: each has seconds of wall clock, which more would take away

Progress = Callable[[int, int], None]  # (answers done, answers in all), of this process


@dataclass(frozen=True)
class EvalResult:
    """Which answers to a task's problems are right."""

    passed: np.ndarray  # bool [P,n]: which of the n answers
    too_long: int = 0  # problems whose prompt does not fit into the model's context: wrong
    cut: float | None = None  # share of the answers that did not end by themselves; None for multiple choice

    def pass_at(self) -> dict[int, Share]:
        """{k: share of problems that k answers solve at least once}, unbiased, with 95 % intervals."""
        return pass_at_k(self.passed)

    @property
    def accuracy(self) -> Share:
        """Share of right answers (pass@1); nanochat's accuracy with n answers is pass@n."""
        return self.pass_at()[1]


class Evaluator:
    """Evaluates models of one config; its programs are compiled once for all parameters.

    rows: multiple-choice questions in a pass, per device; slots: answers generated together. With several processes
    the mesh is one of `own_devices`: each evaluates its part of the problems, and all must make the same calls.
    """

    def __init__(
        self,
        config: GPTConfig,
        tokenizer,
        mesh: Mesh,
        *,
        dtype=jnp.float32,
        attention: str = "chunked",
        rows: int | None = None,
        slots: int = 256,
        tools: Toolbox = CALCULATOR_ALONE,
    ):
        self.tokenizer = tokenizer
        self.engine = Engine(config, tokenizer, mesh, dtype=dtype, attention=attention, slots=slots, tools=tools)
        self.letter_logits = make_letter_logits(
            config, mesh, tokenizer.bos, dtype=dtype, attention=attention, rows=rows
        )

    def evaluate(
        self,
        params,
        eval_set: EvalSet,
        sampling: SamplingParams,
        *,
        samples: int = 1,
        seed: int = 0,
        max_turns: int = 1,
        progress: Progress | None = None,
    ) -> EvalResult:
        """Judge `samples` generated answers to each problem, or the one letter of multiple choice.

        max_turns: answers in a conversation with an environment, of which the last is judged. params: a tree as GPT's,
        on the mesh. If `progress` raises Interrupted on one process, all processes raise it.
        """
        if eval_set.letters is None:
            return self._evaluate_generated(params, eval_set, sampling, samples, seed, max_turns, progress)
        letters = self.choose_letters(params, eval_set, progress)
        return EvalResult(np.array([[judge(eval_set, i, letter)] for i, letter in enumerate(letters)]))

    def choose_letters(self, params, eval_set: EvalSet, progress: Progress | None = None) -> list[str]:
        """The letter that the model prefers for each problem."""

        def choose_own():
            parts = eval_set.prompts, eval_set.letters, eval_set.conversations
            prompts, letters, conversations = map(processes.mine, parts)
            logits = self.letter_logits(params, prompts, letters, progress)
            return [c["letters"][int(np.argmax(row))] for c, row in zip(conversations, logits)]

        return collect_items("the chosen letters", choose_own)

    def _evaluate_generated(self, params, eval_set, sampling, samples, seed, max_turns, progress) -> EvalResult:
        fitting = [i for i, prompt in enumerate(eval_set.prompts) if len(prompt) < self.engine.context]

        def answer_own():
            own = processes.mine(fitting)
            prompts = [eval_set.prompts[i] for i in own]
            groups = self.engine.generate(
                params,
                prompts,
                sampling,
                samples=samples,
                seed=seed,
                examples=own,
                respond=replies(eval_set.task, eval_set.conversations.__getitem__),
                max_turns=max_turns,
                progress=progress,
            )
            answers = [(i, *turns_of(self.tokenizer, sample)) for i, group in zip(own, groups) for sample in group]
            passed = np.reshape(judge_answers(eval_set, answers, progress), (len(own), samples)).tolist()
            return [(row, [sample.ended for sample in group]) for row, group in zip(passed, groups)]

        found = np.array(collect_items("the judged answers", answer_own), bool).reshape(len(fitting), 2, samples)
        passed = np.zeros((len(eval_set.prompts), samples), bool)
        passed[fitting] = found[:, 0]
        cut = 1 - float(np.mean(found[:, 1])) if fitting else 0.0
        return EvalResult(passed, len(eval_set.prompts) - len(fitting), cut)


def judge_answers(eval_set: EvalSet, answers: list[tuple], progress: Progress | None = None) -> list[bool]:
    """Whether each answer (number of the problem, its turns as texts) is right. progress(n, n), with the number of
    answers, is called after each one or at least once a second, so that it can interrupt the judging too."""

    def interruptible():
        if progress:
            progress(len(answers), len(answers))

    if not isinstance(eval_set.task, HumanEval):  # a user's task may not be made for several threads
        passed = []
        for answer in answers:
            passed.append(judge(eval_set, *answer))
            interruptible()
        return passed
    pool = ThreadPoolExecutor(JUDGES)
    try:
        futures = [pool.submit(judge, eval_set, *answer) for answer in answers]
        while wait(futures, timeout=1).not_done:
            interruptible()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def collect_items(what: str, compute: Callable[[], list]) -> list:
    """What every process computes for its part of the items (see `processes.mine`), in the order of all items.

    Where compute raises Interrupted on one process, all processes raise it."""
    return processes.merge(collect(what, compute))
