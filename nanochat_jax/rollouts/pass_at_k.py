"""pass@k on held-out problems while RL goes on: how often k answers have a right one among them."""

from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.evals.eval_set import EvalSet, judge, replies
from nanochat_jax.evals.evaluator import collect_items
from nanochat_jax.evals.intervals import pass_at_k
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import turns_of
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.train.measurement import Measurement

EVAL_STEP = -1  # in place of the step in the sampling's seeds: every evaluation draws alike, and as no step does


def pass_at_k_measurement(
    eval_set: EvalSet | None,
    engine: Engine,
    mesh: Mesh,
    sampling: SamplingParams,
    tokenizer,
    *,
    samples: int,
    seed: int,
    every: int,
    cut_answers: str,
    max_turns: int = 1,
) -> Measurement:
    """pass@k for k = 1..samples of parameters on `mesh`, with 95 % intervals as pass@k_low and pass@k_high; also before
    the first step. What its progress raises ends the measurement on all processes. eval_set: None measures nothing.

    cut_answers: "keep" counts an answer that does not end as it is judged, as `eval` and nanochat do; otherwise it is
    wrong, and what it would have been is there as pass@k_kept. held_out_cut: share of such answers. max_turns: answers
    in a conversation with an environment."""
    if eval_set is None:
        return Measurement("held-out answers", -1, lambda params, progress: {})

    def judged_by_own(params, numbers, progress) -> list[tuple[list[bool], list[bool]]]:
        """Of the problems with these numbers, which answers are right, and which have ended."""
        with engine.holding(params, mesh) as held:
            groups = engine.generate(
                held,
                [eval_set.prompts[i] for i in numbers],
                sampling,
                samples=samples,
                seed=seed,
                step=EVAL_STEP,
                examples=numbers,
                respond=replies(eval_set.task, eval_set.conversations.__getitem__),
                max_turns=max_turns,
                progress=progress,
            )
        return [
            ([judge(eval_set, i, *turns_of(tokenizer, s)) for s in group], [s.ended for s in group])
            for i, group in zip(numbers, groups)
        ]

    def measure(params, progress) -> dict[str, float]:
        own = processes.mine(range(len(eval_set.prompts)))
        judged = collect_items("held-out answers", lambda: judged_by_own(params, own, progress))
        right, ended = np.moveaxis(np.array(judged, bool), 1, 0)
        numbers = {}
        for k, share in pass_at_k(right if cut_answers == "keep" else right & ended).items():
            numbers |= {f"pass@{k}": share.value, f"pass@{k}_low": share.low, f"pass@{k}_high": share.high}
        if cut_answers != "keep":
            numbers |= {f"pass@{k}_kept": share.value for k, share in pass_at_k(right).items()}
        return numbers | {"held_out_cut": 1 - float(ended.mean())}

    return Measurement("held-out answers", every, measure, at_start=True, shown=shown(samples), flag="--eval-every")


def shown(samples: int) -> Callable[[Mapping[str, float]], str]:
    """The console's text of a measurement: pass@1 and pass@samples with their intervals, and what they would be if the
    answers that were cut counted as judged, where that is another number."""

    def text(found: Mapping[str, float]) -> str:
        parts = []
        for k in sorted({1, samples}):
            value, kept = found[f"pass@{k}"], found.get(f"pass@{k}_kept", found[f"pass@{k}"])
            with_cut = "" if kept == value else f", {kept:.1%} with cut answers"
            parts.append(
                f"pass@{k} {value:.1%} ({found[f'pass@{k}_low']:.1%} to {found[f'pass@{k}_high']:.1%}{with_cut})"
            )
        return " | ".join([*parts, *([f"cut {found['held_out_cut']:.1%}"] if found["held_out_cut"] else [])])

    return text
