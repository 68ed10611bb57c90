"""CORE, nanochat's number for a base model: how far its accuracies on 22 tasks are from guessing (0) to perfect (1).

Each example stands behind some others of its task, drawn for it alone. Three kinds of task: which of some choices
continues a question best; which of some contexts makes a continuation likeliest (schema); and whether the model gives
a continuation word for word (language modelling). Facts of nanochat, 2026; texts are never cropped.
"""

import functools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import own_devices
from nanochat_jax.distributed.sharding import own_copy
from nanochat_jax.evals.core_bundle import CoreTask
from nanochat_jax.evals.evaluator import Progress, collect_items
from nanochat_jax.evals.intervals import Share, share
from nanochat_jax.evals.span_scores import Span, SpanScore, common_length, make_span_scores
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tokenizer import Tokenizer

FEWSHOT_SEED = 1234  # of the first example; each further one has the next
SEPARATOR = "\n\n"  # between examples


class CoreResult(NamedTuple):
    """Which examples of a task the model gets right."""

    right: np.ndarray  # bool [n]
    beyond_context: int  # examples with a text longer than the rows that the model was trained on
    baseline: float  # accuracy of guessing, 0 to below 1

    @property
    def accuracy(self) -> Share:
        """Share of right ones, with its 95 % interval."""
        return share(self.right)

    @property
    def centered(self) -> float:
        """The accuracy from guessing, 0, to perfect, 1."""
        return centered(self.accuracy.value, self.baseline)


def centered(accuracy: float, baseline: float) -> float:
    """An accuracy as a share of the way from guessing, 0, to perfect, 1; below 0 for one worse than guessing."""
    return (accuracy - baseline) / (1 - baseline)


def core_metric(results: Sequence[CoreResult]) -> float:
    """CORE: the mean over the tasks of their centred accuracies."""
    return float(np.mean([result.centered for result in results]))


def draw_examples(count: int, index: int, size: int) -> list[int]:
    """Which `count` of a task's `size` examples stand before the one with this index, in this order."""
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(size - 1), count) if count else []
    return [i + (i >= index) for i in drawn]


def texts_of(task: CoreTask, index: int) -> list[str]:
    """The texts that an example is judged by: one for each choice or context, or the text before a continuation and
    that with it."""
    shots = [task.rows[i] for i in draw_examples(task.fewshot, index, len(task.rows))]
    row = task.rows[index]
    if task.kind == "multiple_choice":
        before = [row["query"]] * len(row["choices"])
        shown, after = [(shot["query"], shot["choices"][shot["gold"]]) for shot in shots], row["choices"]
    elif task.kind == "schema":
        before, after = row["context_options"], [row["continuation"]] * len(row["context_options"])
        shown = [(shot["context_options"][shot["gold"]], shot["continuation"]) for shot in shots]
    else:
        before, after = [row["context"].strip()] * 2, ["", row["continuation"]]
        shown = [(shot["context"].strip(), shot["continuation"]) for shot in shots]
    start = "".join(f"{a}{task.delimiter}{b}{SEPARATOR}" for a, b in shown)
    texts = [f"{start}{a}{task.delimiter}{b}" for a, b in zip(before, after, strict=True)]
    if task.kind == "language_modeling":  # tokens of words begin with the blank, so the text before ends without one
        texts[0] = texts[0].strip()
    return texts


def spans_of(task: CoreTask, index: int, ids: Sequence[np.ndarray]) -> list[Span]:
    """What is scored of an example whose `texts_of` are these tokens, int32 [n] each: what comes after the beginning
    that all have in common, of a schema the end that all have in common, of language modelling the continuation.

    ValueError: the tokens before a continuation are others when it follows."""
    ends = [len(tokens) for tokens in ids]
    if task.kind == "multiple_choice":
        starts = [common_length(ids)] * len(ids)
    elif task.kind == "schema":
        common = common_length([tokens[::-1] for tokens in ids])
        starts = [end - common for end in ends]
    else:
        starts, before, ids, ends = ends[:1], ids[0], ids[1:], ends[1:]
        if not np.array_equal(before, ids[0][: len(before)]) or starts == ends:
            raise ValueError(
                f"{task.label}, example {index}: the tokens of the context must be the first of those of context and "
                "continuation together, and more must follow; this tokenizer joins the two, or the continuation is "
                "empty"
            )
    return [Span(*span) for span in zip(ids, starts, ends)]


def is_right(task: CoreTask, index: int, scores: Sequence[SpanScore]) -> bool:
    """Whether an example is solved, by what the model says of its spans: the first with the smallest mean loss is the
    gold one; of language modelling the continuation is what greedy decoding gives."""
    if task.kind == "language_modeling":
        return scores[0].greedy
    losses = [score.mean_loss for score in scores]
    return losses.index(min(losses)) == task.rows[index]["gold"]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text as bos and its tokens, int32 [n]."""
    ids, lengths = tokenizer.encode_many(texts)
    return [np.concatenate([[tokenizer.bos], part]).astype(np.int32) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def make_core_task(context: int, tokenizer: Tokenizer, span_scores: Callable) -> Callable[..., CoreResult]:
    """-> evaluate(params, task, progress=None): a CoreTask's result, by the scores that `make_span_scores` made.

    context: tokens of the rows that the model was trained on. With several processes the scores are of one of
    `own_devices`: each evaluates its part of the examples, and all must make the same calls. progress counts examples
    of this process, see `run_passes`."""

    def evaluate(params, task: CoreTask, progress: Progress | None = None) -> CoreResult:
        def judge_own() -> list[list[bool]]:
            own = processes.mine(range(len(task.rows)))
            texts = [texts_of(task, i) for i in own]
            ids = iter(tokenize(tokenizer, [text for some in texts for text in some]) if own else [])
            spans = [spans_of(task, i, [next(ids) for _ in some]) for i, some in zip(own, texts)]
            scores = span_scores(params, spans, progress)
            judged = [is_right(task, i, some) for i, some in zip(own, scores)]
            longest = (max(span.end for span in some) for some in spans)
            return [[right, length > context] for right, length in zip(judged, longest)]

        right, beyond = np.array(collect_items(task.label, judge_own), bool).T
        return CoreResult(right, int(beyond.sum()), task.baseline)

    return evaluate


def make_core(
    config: GPTConfig, tokenizer: Tokenizer, tasks: Sequence[CoreTask], *, mesh: Mesh, dtype, attention: str
) -> Callable[..., dict[str, float]]:
    """-> measure(params, progress): core_metric, and each task's centred accuracy as centered_results/<label>.

    All processes must call it together. progress: as of `make_chatcore`."""
    processes.agree("CORE's examples", {task.label: len(task.rows) for task in tasks})
    own = own_devices(mesh)
    span_scores = make_span_scores(config, own, tokenizer.bos, dtype=dtype, attention=attention)
    evaluate = make_core_task(config.sequence_len, tokenizer, span_scores)

    def measure(params, progress: Callable[[int, int, str], None] | None = None) -> dict[str, float]:
        with jax.set_mesh(own):
            params = own_copy(params, mesh, dtype)
            results = {
                task.label: evaluate(params, task, functools.partial(progress, part=task.label) if progress else None)
                for task in tasks
            }
        by_task = {f"centered_results/{label}": result.centered for label, result in results.items()}
        return {"core_metric": core_metric([*results.values()]), **by_task}

    return measure
