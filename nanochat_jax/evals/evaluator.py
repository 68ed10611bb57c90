"""Chat models on tasks: problems are put to the model, its answers are judged, and ChatCORE sums it up.

Multiple choice: the offered letter with the largest logit after the prompt, the first of equals, without generating.
Every other task: a text is generated, with the calculator, and `task.evaluate` judges it. Facts of nanochat, 2026: its
five tasks and their baselines, the test splits, 512 new tokens, greedy. Until 2026-07 SpellingBee was the sixth task.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.evals.eval_set import EvalSet, judge
from nanochat_jax.evals.intervals import Share, pass_at_k
from nanochat_jax.evals.multiple_choice import make_letter_logits
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import SamplingParams, answer_text
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tasks import HumanEval

JUDGES = min(8, os.cpu_count() or 1)  # programs run at once: each has seconds of wall clock, which more would take away


@dataclass(frozen=True)
class EvalResult:
    """What became of a task's problems."""

    passed: np.ndarray  # bool [P,n]: which of the n answers are right
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
    """Puts problems to the model that was loaded last; programs are compiled once for all models of this config.

    rows: multiple-choice questions in a pass, per device; slots: answers generated together.
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
    ):
        self.tokenizer, how = tokenizer, {"dtype": dtype, "attention": attention}
        self.engine = Engine(config, tokenizer, mesh, slots=slots, **how)
        self._letter_logits = make_letter_logits(config, mesh, tokenizer.bos, rows=rows, **how)
        self.load(None)

    def load(self, params) -> None:
        """Take these parameters, sharded in any way; None lets go of the last ones."""
        self._params, self._in_engine = params, False
        self.engine.load(None)

    def evaluate_set(
        self,
        problems: EvalSet,
        sampling: SamplingParams,
        *,
        samples: int = 1,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvalResult:
        """Judge `samples` answers to each problem, or the one letter. progress(answers done, answers in all)."""
        if problems.letters is None:
            return self._generated(problems, sampling, samples, seed, progress)
        chosen = self.choose(problems, progress)
        return EvalResult(np.array([[judge(problems, i, letter)] for i, letter in enumerate(chosen)]))

    def choose(self, problems: EvalSet, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """The letter that the model prefers for each problem."""
        own = [processes.mine(x) for x in (problems.prompts, problems.letters, problems.conversations)]
        logits = self._letter_logits(self._params, *own[:2], progress) if own[0] else []
        return _merged([c["letters"][int(np.argmax(row))] for c, row in zip(own[2], logits)])

    def _generated(self, problems, sampling, samples, seed, progress) -> EvalResult:
        if not self._in_engine:
            self.engine.load(self._params)
            self._in_engine = True
        fitting = [i for i, prompt in enumerate(problems.prompts) if len(prompt) < self.engine.context]
        own = processes.mine(fitting)
        prompts = [problems.prompts[i] for i in own]
        how = {"samples": samples, "seed": seed, "examples": own, "progress": progress}
        groups = self.engine.generate(prompts, sampling, **how) if prompts else []
        answers = [(i, answer_text(self.tokenizer, sample)) for i, group in zip(own, groups) for sample in group]
        judged = np.reshape(self._judged(problems, answers), (len(own), samples)).tolist()
        judged = _merged([(row, [sample.ended for sample in group]) for row, group in zip(judged, groups)])
        passed = np.zeros((len(problems.prompts), samples), bool)
        passed[fitting] = np.reshape([row for row, _ in judged], (len(fitting), samples))
        ended = [end for _, ends in judged for end in ends]
        return EvalResult(passed, len(problems.prompts) - len(fitting), 1 - float(np.mean(ended)) if ended else 0.0)

    def _judged(self, problems: EvalSet, answers: list[tuple[int, str]]) -> list[bool]:
        if not isinstance(problems.task, HumanEval):  # a user's judge may be made for one thread
            return [judge(problems, *answer) for answer in answers]
        pool = ThreadPoolExecutor(JUDGES)
        try:
            return list(pool.map(lambda answer: judge(problems, *answer), answers))
        finally:
            pool.shutdown(cancel_futures=True)


def _merged(own: list) -> list:
    """What every process found of its part (see `processes.mine`), in the order of the whole."""
    parts = processes.exchange("what became of the problems", own)
    merged = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        merged[i :: len(parts)] = part
    return merged
