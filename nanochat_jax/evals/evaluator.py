"""Chat models on tasks: problems are put to the model, its answers are judged, and ChatCORE sums it up.

Multiple choice: the offered letter with the largest logit after the prompt, the first of equals, without generating.
Every other task: a text is generated, with the calculator, and `task.evaluate` judges it. Facts of nanochat, 2026: its
five tasks and their baselines, the test splits, 512 new tokens, greedy. Until 2026-07 SpellingBee was the sixth task.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.sharding import own_copy, own_devices
from nanochat_jax.evals.bits_per_byte import make_letter_logits
from nanochat_jax.evals.intervals import Share, pass_at_k
from nanochat_jax.files.paths import print0
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import Sample, Sampling
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tasks import (
    ARC,
    GSM8K,
    MMLU,
    Arithmetic,
    HumanEval,
    SimpleSpelling,
    SpellingBee,
    Task,
    load_task,
    sandbox,
)
from nanochat_jax.train.loop import Measurement

BASELINES = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0}
WITH_SPELLING = BASELINES | {"SpellingBee": 0.0}
TASKS = (*WITH_SPELLING, "SimpleSpelling", "Arithmetic")
MADE_UP = 256  # problems of a task that makes them up, as nanochat's SpellingBee had
JUDGES = min(8, os.cpu_count() or 1)  # programs run at once: each has seconds of wall clock, which more would take away
NEW_TOKENS = 512


def make_task(name: str, data_dir: Path | None = None, *, unsafe: bool = False) -> Task:
    """The task of this name in TASKS, its test split, or the one that module:Class names.

    FileNotFoundError: its data cannot be had. ValueError: there is no such task, or HumanEval where no guard can hold
    the programs and not `unsafe`.
    """
    where = {"data_dir": data_dir}
    if ":" in name:
        return load_task(name, "-a")
    if name in ("ARC-Easy", "ARC-Challenge"):
        return ARC(name, "test", **where)
    if name == "HumanEval":
        if not unsafe and (fault := sandbox.guard_fault()):
            raise ValueError(
                f"{fault}, so HumanEval, which runs what the model writes, is refused; --unsafe-exec of "
                "nanochat_jax.eval runs it with your files and network in reach"
            )
        return HumanEval(unsafe=unsafe, **where)
    if name == "Arithmetic":
        return Arithmetic("test", MADE_UP)
    if name in ("SpellingBee", "SimpleSpelling"):
        return {"SpellingBee": SpellingBee, "SimpleSpelling": SimpleSpelling}[name]("test", MADE_UP, **where)
    if name in ("MMLU", "GSM8K"):
        return {"MMLU": MMLU, "GSM8K": GSM8K}[name]("test", **where)
    raise ValueError(f"-a must name tasks among {', '.join(TASKS)}, or module:Class, got {name!r:.60}")


@dataclass(frozen=True)
class Problems:
    """A task's problems as the model sees them."""

    name: str
    task: Task
    conversations: list[dict]
    prompts: list[np.ndarray]  # int32 [T] each, up to assistant_start
    letters: list[list[int]] | None  # of multiple choice: token ids of each problem's letters


def prepare(name: str, task: Task, tokenizer, limit: int | None = None) -> Problems:
    """The first `limit` problems (None: all). They are multiple choice where the conversations carry letters.

    ValueError names the problem: it cannot be rendered, a letter is not one token, or its answer cannot be judged.
    """
    conversations, prompts, letters = [], [], []
    choice = False
    for i in range(len(task) if limit is None else min(limit, len(task))):
        try:
            conversation = task[i]
            conversations.append(conversation)
            prompts.append(np.array(tokenizer.render_for_completion(conversation), np.int32))
            choice = choice if i else task.eval_type == "categorical" or "letters" in conversation
            if choice:
                letters.append(letter_tokens(conversation["letters"], tokenizer))
        except (Exception, SystemExit) as e:  # a user's class may do anything
            raise ValueError(f"{name}, problem {i}: {told(e)}") from e
    if not conversations:
        raise ValueError(f"{name} has no problems to put to the model")
    problems = Problems(name, task, conversations, prompts, letters if choice else None)
    judge(problems, 0, conversations[0]["letters"][0] if choice else "")  # a task without a judge is found out now
    return problems


def letter_tokens(letters: Sequence[str], tokenizer) -> list[int]:
    """The token of each letter. ValueError: there is none, or the tokenizer splits one."""
    if not letters:
        raise ValueError("a multiple-choice question must offer at least one letter")
    split = [tokenizer.encode(letter) for letter in letters]
    for letter, ids in zip(letters, split):
        if len(ids) != 1:
            raise ValueError(f"each letter must be one token, but {letter!r:.40} is {len(ids)} for this tokenizer")
    return [ids[0] for ids in split]


def judge(problems: Problems, i: int, answer: str) -> bool:
    """Whether the task takes `answer` to problem i as right. ValueError: it fails to say."""
    try:
        score = problems.task.evaluate(problems.conversations[i], answer)
        known = bool(score in (0, 1))
    except (Exception, SystemExit) as e:
        raise ValueError(f"{problems.name} cannot judge the answer to problem {i}: {told(e)}") from e
    if not known:
        raise ValueError(f"{problems.name}: evaluate must return 0 or 1, got {score!r:.40} for problem {i}")
    return bool(score)


def told(e: BaseException) -> str:
    """What went wrong in a task, in words: with the error's class unless its sentence was made to be read."""
    return str(e) if isinstance(e, ValueError | NotImplementedError) else f"{type(e).__name__}: {e}"


def answer_text(tokenizer, sample: Sample) -> str:
    """What `evaluate` and `reward` judge: the generated text with the tool's results, without the end token.

    Special tokens are as written in the vocabulary, as in nanochat."""
    return tokenizer.decode(sample.tokens[: len(sample.tokens) - sample.ended])


@dataclass(frozen=True)
class Verdict:
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


class Examiner:
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

    def examine(
        self,
        problems: Problems,
        sampling: Sampling,
        *,
        samples: int = 1,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Verdict:
        """Judge `samples` answers to each problem, or the one letter. progress(answers done, answers in all)."""
        if problems.letters is None:
            return self._generated(problems, sampling, samples, seed, progress)
        chosen = self.choose(problems, progress)
        return Verdict(np.array([[judge(problems, i, letter)] for i, letter in enumerate(chosen)]))

    def choose(self, problems: Problems, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """The letter that the model prefers for each problem."""
        own = [processes.mine(x) for x in (problems.prompts, problems.letters, problems.conversations)]
        logits = self._letter_logits(self._params, *own[:2], progress) if own[0] else []
        return _merged([c["letters"][int(np.argmax(row))] for c, row in zip(own[2], logits)])

    def _generated(self, problems, sampling, samples, seed, progress) -> Verdict:
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
        return Verdict(passed, len(problems.prompts) - len(fitting), 1 - float(np.mean(ended)) if ended else 0.0)

    def _judged(self, problems: Problems, answers: list[tuple[int, str]]) -> list[bool]:
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


def chatcore(accuracies: Mapping[str, float], baselines: Mapping[str, float] = BASELINES) -> float | None:
    """Mean over the tasks of `baselines` of (accuracy - baseline) / (1 - baseline): 0 is guessing, 1 is perfect.

    None where a task is missing: a mean of fewer tasks would be another number."""
    if any(name not in accuracies for name in baselines):
        return None
    return float(np.mean([(accuracies[name] - base) / (1 - base) for name, base in baselines.items()]))


def chatcore_measurement(
    every: int,
    model_config: GPTConfig,
    tokenizer,
    *,
    mesh: Mesh,
    dtype,
    attention: str = "chunked",
    data_dir: Path | None = None,
    max_cat: int = -1,
    max_sample: int = 24,
    log: Callable = print0,
) -> Measurement:
    """ChatCORE every so many steps, on the first max_cat problems of each multiple-choice task (-1: all) and the first
    max_sample of the others; greedy, with nanochat's 512 new tokens.

    Measures chatcore (None of it, and `log` says so, where one of the five tasks cannot be run), chatcore_cat (of the
    multiple-choice tasks alone), chatcore_with_spelling, and each task's accuracy as chatcore/<task>.
    """
    if every <= 0:
        return Measurement(-1, lambda params: {})
    papers = []
    for name in WITH_SPELLING:
        try:
            with processes.zero_first(name):
                task = make_task(name, data_dir)
        except (ValueError, OSError) as e:
            log(f"NOTE: {name} is not measured: {e}")
            continue
        limit = max_cat if task.eval_type == "categorical" else max_sample
        papers.append(prepare(name, task, tokenizer, None if limit < 0 else limit))
    if missing := sorted(BASELINES.keys() - {problems.name for problems in papers}):
        log(f"NOTE: no ChatCORE without {', '.join(missing)}; the tasks that are there are measured")
    if not papers:
        return Measurement(-1, lambda params: {})
    papers.sort(key=lambda paper: -max(map(len, paper.prompts)))  # the engine keeps room for the longest so far
    own = own_devices(mesh)
    examiner = Examiner(model_config, tokenizer, own, dtype=dtype, attention=attention)
    sampling = Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS)
    letters = {name: BASELINES[name] for name in BASELINES if BASELINES[name]}
    sums = {"chatcore": BASELINES, "chatcore_cat": letters, "chatcore_with_spelling": WITH_SPELLING}

    def measure(params) -> dict[str, float]:
        with jax.set_mesh(own):
            examiner.load(own_copy(params, mesh))
            try:
                accuracies = {paper.name: examiner.examine(paper, sampling).accuracy.value for paper in papers}
            finally:
                examiner.load(None)
        found = {name: chatcore(accuracies, baselines) for name, baselines in sums.items()}
        found |= {f"chatcore/{name}": accuracies.get(name) for name in WITH_SPELLING}
        return {name: value for name, value in found.items() if value is not None}

    return Measurement(every, measure)
