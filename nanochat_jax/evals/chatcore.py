"""ChatCORE, nanochat's one number for a chat model: how far its accuracies are from guessing (0) to perfect (1)."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import own_devices
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import own_copy
from nanochat_jax.evals.eval_set import make_eval_set
from nanochat_jax.evals.evaluator import EvalResult, Evaluator
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tasks.registry import make_task

BASELINES = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0}
WITH_SPELLING = BASELINES | {"SpellingBee": 0.0}
NEW_TOKENS = 512  # of a generated answer, as in nanochat
SLOTS = 256  # answers that are generated together


def chatcore(accuracies: Mapping[str, float], baselines: Mapping[str, float] = BASELINES) -> float | None:
    """Mean over the tasks of `baselines` of (accuracy - baseline) / (1 - baseline): 0 is guessing, 1 is perfect.

    None where a task is missing, because a mean over fewer tasks could not be compared."""
    if any(name not in accuracies for name in baselines):
        return None
    return float(np.mean([(accuracies[name] - base) / (1 - base) for name, base in baselines.items()]))


def share_cut(results: Iterable[EvalResult]) -> float | None:
    """The share of all generated answers that did not end by themselves; None where none was generated."""
    generated = [(result.cut, result.passed.size) for result in results if result.cut is not None]
    return sum(cut * count for cut, count in generated) / sum(count for _, count in generated) if generated else None


def make_chatcore(
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
) -> Callable[..., dict[str, float]] | None:
    """-> measure(params, progress=None): ChatCORE on the first max_cat problems of each multiple-choice task (-1: all),
    and the first max_sample of the others; greedy, with nanochat's 512 new tokens. None where no task can be run.

    measure gives chatcore, chatcore_cat (of the multiple-choice tasks alone), chatcore_with_spelling, each task's
    accuracy as chatcore/<task>, and the share of the generated answers that did not end as chatcore_cut; of the means
    only those whose tasks can all be run, `log` says which cannot. All processes must call it together. progress(
    problems done, problems of the task, part=its name) is called several times during a task; if it raises Interrupted
    on one process, measure raises it on all. ValueError: a task is there on one process only, or with fewer problems.
    """
    eval_sets, problems = [], {}
    for name in WITH_SPELLING:
        try:
            with processes.process_zero_first(name):
                task = make_task(name, data_dir=data_dir)
        except (ValueError, OSError) as e:
            log(f"NOTE: {name} is not measured: {e}")
            problems[name] = "missing"
            continue
        limit = max_cat if task.eval_type == "categorical" else max_sample
        eval_sets.append(make_eval_set(name, task, tokenizer, None if limit < 0 else limit))
        problems[name] = f"{len(eval_sets[-1].prompts)} problems"
    processes.agree("ChatCORE's problems", problems)  # each process answers its part of the same ones
    if missing := sorted(BASELINES.keys() - {eval_set.name for eval_set in eval_sets}):
        log(f"NOTE: no ChatCORE without {', '.join(missing)}; the tasks that are there are measured")
    if not eval_sets:
        return None
    # The longest prompts come first: the engine's caches then have room for the others, and it compiles once.
    eval_sets.sort(key=lambda eval_set: -max(map(len, eval_set.prompts)))
    own = own_devices(mesh)  # each process evaluates its part of the problems by itself
    evaluator = Evaluator(model_config, tokenizer, own, dtype=dtype, attention=attention, slots=SLOTS)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    categorical = {name: baseline for name, baseline in BASELINES.items() if baseline}
    means = {"chatcore": BASELINES, "chatcore_cat": categorical, "chatcore_with_spelling": WITH_SPELLING}

    def measure(params, progress: Callable[[int, int, str], None] | None = None) -> dict[str, float]:
        results = {}
        with jax.set_mesh(own):
            params = own_copy(params, mesh, dtype)
            for eval_set in eval_sets:
                of_task = functools.partial(progress, part=eval_set.name) if progress else None
                results[eval_set.name] = evaluator.evaluate(params, eval_set, sampling, progress=of_task)
        accuracies = {name: result.accuracy.value for name, result in results.items()}
        found = {name: chatcore(accuracies, baselines) for name, baselines in means.items()}
        found |= {f"chatcore/{name}": accuracies.get(name) for name in WITH_SPELLING}
        found["chatcore_cut"] = share_cut(results.values())
        return {name: value for name, value in found.items() if value is not None}

    return measure
