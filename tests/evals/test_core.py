"""CORE on small tasks: what a batch gives is what one text at a time gives. nanochat's values are in tests/golden.

Run: python -m pytest tests/evals/test_core.py
"""

import itertools
import random

import jax
import numpy as np
import pytest
from flax import nnx

from nanochat_jax.distributed import processes, sharding
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.signals import Interrupted
from nanochat_jax.evals import core
from nanochat_jax.evals.core_bundle import CoreTask, read_tasks
from nanochat_jax.evals.span_scores import Span, make_span_scores
from nanochat_jax.model.gpt import abstract_gpt
from tests.support import tiny
from tests.support.core_files import write_bundle
from tests.support.models import random_params

ONE = make_mesh("data=1")
TOKENIZER = tiny.tokenizer()
RNG = np.random.default_rng(0)


def alike(prefix: int, lengths: list[int]) -> list[Span]:
    """An example whose texts have so many tokens in common, and so many more."""
    common, *rests = (RNG.integers(0, tiny.CONFIG.vocab_size, n, dtype=np.int32) for n in (prefix, *lengths))
    starts = [prefix + int(RNG.integers(1, n)) for n in lengths]
    ends = [int(RNG.integers(start + 1, prefix + n + 1)) for start, n in zip(starts, lengths)]
    return [Span(np.append(common, rest), *at) for rest, *at in zip(rests, starts, ends)]


# Texts of one and of several tokens in common, as many as a window has and more, with much and little behind them.
EXAMPLES = [alike(0, [length]) for length in (2, 32, 33, 90)]
EXAMPLES += [alike(1, [2, 40]), alike(32, [2, 3, 9]), alike(90, [33, 17, 2, 5]), alike(150, [2, 40])]
SPANS = [s for some in EXAMPLES for s in some]


@pytest.fixture(scope="module")
def params():
    made = random_params(tiny.CONFIG)
    return jax.device_put(made, sharding.param_shardings(made, ONE))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return read_tasks(write_bundle(tmp_path_factory.mktemp("core") / "eval_bundle"))


@pytest.fixture(scope="module")
def logits(params):
    """Of every text, by the plain forward pass of each alone; what follows it changes nothing."""
    forward = jax.jit(lambda params, ids: nnx.merge(abstract_gpt(tiny.CONFIG)[0], params)(ids))
    padded = [np.pad(s.ids, (0, -len(s.ids) % 64))[None] for s in SPANS]
    return [np.asarray(forward(params, ids)[0, : len(s.ids)], np.float64) for s, ids in zip(SPANS, padded)]


@pytest.fixture(scope="module")
def span_scores():
    """Two examples in a pass, so that there are few programs."""
    return make_span_scores(tiny.CONFIG, ONE, TOKENIZER.bos, rows=2)


@pytest.fixture(scope="module")
def evaluate(span_scores):
    return core.make_core_task(tiny.CONFIG.sequence_len, TOKENIZER, span_scores)


# --------------------------------------------------------------------------------------------------------- span scores
@pytest.mark.parametrize(("mesh", "rows"), [("data=1", None), ("data=4,model=2", 1)])
def test_texts_in_a_batch_have_the_scores_of_the_plain_forward_of_each(params, logits, mesh, rows):
    mesh, done = make_mesh(mesh), []
    span_scores = make_span_scores(tiny.CONFIG, mesh, TOKENIZER.bos, rows=rows)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        scores = span_scores(placed, EXAMPLES, lambda *counts: done.append(counts))
    assert [*map(len, scores)] == [*map(len, EXAMPLES)]
    for s, z, score in zip(SPANS, logits, itertools.chain(*scores), strict=True):
        at = np.arange(s.start, s.end)
        logprobs = z[at - 1] - np.log(np.exp(z[at - 1]).sum(-1, keepdims=True))
        assert score.mean_loss == pytest.approx(-logprobs[np.arange(len(at)), s.ids[at]].mean(), rel=1e-4)
        assert score.greedy == (z[at - 1].argmax(-1) == s.ids[at]).all()
    assert done[-1] == (len(EXAMPLES), len(EXAMPLES)) and sorted(done) == done


def test_what_greedy_decoding_gives_is_greedy_and_nothing_else(params, logits, span_scores):
    likeliest = [z[-1].argmax() for z in logits]
    right = [Span(np.append(s.ids, t).astype(np.int32), len(s.ids), len(s.ids) + 1) for s, t in zip(SPANS, likeliest)]
    wrong = [s._replace(ids=np.append(s.ids[:-1], (s.ids[-1] + 1) % 200).astype(np.int32)) for s in right]
    scores = span_scores(params, [[s] for s in right + wrong])
    assert [score.greedy for (score,) in scores] == [True] * len(right) + [False] * len(wrong)


def test_an_empty_span_has_no_loss_and_is_no_error(params, span_scores):
    ids = np.arange(9, dtype=np.int32)
    (scores,) = span_scores(params, [[Span(ids, 9, 9), Span(ids, 0, 9), Span(ids[:4], 4, 4)]])
    assert all(np.isnan(score.mean_loss) and score.greedy for score in scores) and span_scores(params, []) == []


def test_weights_that_are_no_numbers_are_said_instead_of_scored(params, span_scores):
    broken = params | {"lm_head": params["lm_head"] * np.nan}
    with pytest.raises(FloatingPointError, match="not finite in a text that is scored"):
        span_scores(broken, EXAMPLES[:2])


# --------------------------------------------------------------------------------------------- examples and their texts
@pytest.mark.parametrize("size", [4, 30, 2000])
def test_the_examples_shown_are_others_and_those_that_a_list_of_all_others_would_give(size):
    for index in (0, 1, size // 2, size - 1):
        others = [i for i in range(size) if i != index]
        drawn = core.draw_examples(3, index, size)
        assert drawn == random.Random(1234 + index).sample(others, 3) and index not in drawn
    assert core.draw_examples(0, 0, 1) == []


def row(kind, *texts):
    names = {"multiple_choice": ("query", "choices"), "schema": ("continuation", "context_options")}
    named = names.get(kind, ("context", "continuation"))
    return dict(zip(named, texts)) | {"gold": 1}


def task_of(kind, rows, fewshot=0, delimiter=" "):
    return CoreTask("t", kind, fewshot, delimiter, 0.0, rows)


@pytest.mark.parametrize(
    ("kind", "texts", "expected", "scored"),
    [
        ("multiple_choice", ("Q?", ["ab", "ac"]), ["Q? ab", "Q? ac"], ["b", "c"]),
        ("schema", ("the end", ["A", "BB"]), ["A the end", "BB the end"], [" the end"] * 2),
        ("language_modeling", (" some \n", "text "), ["some", "some text "], [" text "]),
    ],
)
def test_each_kind_of_task_scores_its_own_part(kind, texts, expected, scored):
    task = task_of(kind, [row(kind, *texts)])
    assert core.texts_of(task, 0) == expected
    spans = core.spans_of(task, 0, core.tokenize(TOKENIZER, expected))
    assert [TOKENIZER.decode(s.ids[s.start : s.end]) for s in spans] == scored
    assert all(s.ids[0] == TOKENIZER.bos and s.end == len(s.ids) for s in spans)


def test_a_continuation_that_the_tokenizer_joins_with_the_context_is_refused_with_its_example(monkeypatch):
    rows = [row("language_modeling", "a", "b"), row("language_modeling", "a", "")]
    for index, delimiter in ((0, " "), (1, "")):
        task = task_of("language_modeling", rows, delimiter=delimiter)
        ids = [np.array([1, 2]), np.array([1, 3, 4]) if index == 0 else np.array([1, 2])]
        with pytest.raises(ValueError, match=f"t, example {index}: the tokens of the context must be the first"):
            core.spans_of(task, index, ids)


def test_the_first_of_equal_choices_wins(params, evaluate):
    task = task_of("multiple_choice", [row("multiple_choice", "Q?", ["same", "same", "same"])])
    assert evaluate(params, task).right.tolist() == [False]  # gold is the second


# ------------------------------------------------------------------------------------------------------ the evaluation
def test_centred_is_the_way_from_guessing_to_perfect():
    assert [core.centered(accuracy, 0.25) for accuracy in (0.25, 1.0, 0.0)] == [0.0, 1.0, pytest.approx(-1 / 3)]
    results = [core.CoreResult(np.array(right), 0, base) for right, base in (([1, 1], 0.5), ([0, 1], 0.0))]
    assert core.core_metric(results) == 0.75


def test_measured_in_training_is_what_the_evaluation_of_each_task_gives(params, tasks, evaluate):
    measure = core.make_core(tiny.CONFIG, TOKENIZER, tasks, mesh=ONE, dtype="float32", attention="chunked")
    parts = []
    found = measure(params, lambda done, total, part: parts.append(part))
    results = {task.label: evaluate(params, task) for task in tasks}
    assert {*parts} == {*results}
    assert found.pop("core_metric") == pytest.approx(core.core_metric([*results.values()]))
    assert found == {f"centered_results/{label}": result.centered for label, result in results.items()}
    assert all(len(result.right) == len(task.rows) for result, task in zip(results.values(), tasks))
    assert results["which"].beyond_context > 0 == results["who"].beyond_context


def test_processes_divide_the_examples_and_all_know_all_of_them(params, tasks, evaluate, monkeypatch):
    whole = [evaluate(params, task).right.tolist() for task in tasks]
    parts = {}

    def part_of(number):
        def exchange(what, own):
            parts[what, number] = own
            return [own]

        monkeypatch.setattr(processes, "mine", lambda items: items[number::3])
        monkeypatch.setattr(processes, "exchange", exchange)
        for task in tasks:
            evaluate(params, task)

    for number in range(3):
        part_of(number)
    monkeypatch.setattr(processes, "exchange", lambda what, own: [parts[what, number] for number in range(3)])
    assert [evaluate(params, task).right.tolist() for task in tasks] == whole


def test_an_interrupt_ends_it(params, tasks, evaluate):
    def interrupt(done, total):
        raise Interrupted

    with pytest.raises(Interrupted):
        evaluate(params, tasks[0], interrupt)
