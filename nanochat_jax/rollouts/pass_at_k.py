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

EVAL_STEP = -1  # in place of the step in the sampling's seeds: every evaluation draws alike, and as no step does


def make_pass_at_k(
    eval_set: EvalSet, engine: Engine, mesh: Mesh, sampling: SamplingParams, tokenizer, *, samples: int, seed: int
) -> Callable[..., dict[str, float]]:
    """-> measure(params on `mesh`, progress): pass@k for k = 1..samples, with 95 % intervals as pass@k_low and
    pass@k_high. progress(answers done, answers in all): what it raises ends the measurement on all processes."""

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

    return measure


def shown(samples: int) -> Callable[[Mapping[str, float]], str]:
    """The console's text of a measurement: pass@1 and pass@samples with their intervals."""

    def text(found: Mapping[str, float]) -> str:
        return " | ".join(
            f"pass@{k} {found[f'pass@{k}']:.1%} ({found[f'pass@{k}_low']:.1%} to {found[f'pass@{k}_high']:.1%})"
            for k in sorted({1, samples})
        )

    return text
