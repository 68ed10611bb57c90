"""pass@k on held-out problems while RL goes on: how often k answers have a right one among them."""

from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.evals.eval_set import EvalSet, judge
from nanochat_jax.evals.evaluator import collect_items
from nanochat_jax.evals.intervals import pass_at_k
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import answer_text
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
) -> Measurement:
    """pass@k for k = 1..samples of parameters on `mesh`, with 95 % intervals as pass@k_low and pass@k_high; also before
    the first step. What its progress raises ends the measurement on all processes. eval_set: None measures nothing."""
    if eval_set is None:
        return Measurement("held-out answers", -1, lambda params, progress: {})

    def passed_by_own(params, numbers, progress) -> list[list[bool]]:
        """Of the problems with these numbers, which answers are right."""
        with engine.holding(params, mesh) as held:
            groups = engine.generate(
                held,
                [eval_set.prompts[i] for i in numbers],
                sampling,
                samples=samples,
                seed=seed,
                step=EVAL_STEP,
                examples=numbers,
                progress=progress,
            )
        answers = [[answer_text(tokenizer, sample) for sample in group] for group in groups]
        return [[judge(eval_set, i, answer) for answer in group] for i, group in zip(numbers, answers)]

    def measure(params, progress) -> dict[str, float]:
        own = processes.mine(range(len(eval_set.prompts)))
        passed = collect_items("held-out answers", lambda: passed_by_own(params, own, progress))
        numbers = {}
        for k, share in pass_at_k(passed).items():
            numbers |= {f"pass@{k}": share.value, f"pass@{k}_low": share.low, f"pass@{k}_high": share.high}
        return numbers

    return Measurement("held-out answers", every, measure, at_start=True, shown=shown(samples), flag="--eval-every")


def shown(samples: int) -> Callable[[Mapping[str, float]], str]:
    """The console's text of a measurement: pass@1 and pass@samples with their intervals."""

    def text(found: Mapping[str, float]) -> str:
        return " | ".join(
            f"pass@{k} {found[f'pass@{k}']:.1%} ({found[f'pass@{k}_low']:.1%} to {found[f'pass@{k}_high']:.1%})"
            for k in sorted({1, samples})
        )

    return text
