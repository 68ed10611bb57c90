"""CORE: which examples stand before which, the texts, their tokens, what is scored, and what follows from the scores.

Run: python -m pytest tests/golden/test_core.py
"""

import functools
import math

import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals import core
from nanochat_jax.evals.core_bundle import CoreTask, checked_row, read_tasks
from nanochat_jax.evals.span_scores import make_span_scores
from nanochat_jax.tokenizer import Tokenizer
from tests.golden import data, models


def named(file: str) -> list[str]:
    """Models that a file of CORE is about, for parametrize."""
    if not (data.GOLDEN / file).exists():
        return ["(none)"]
    found = data.load_json(file)
    return [*found.get("models", found)]


@functools.cache
def tasks_of(name: str) -> list[tuple[CoreTask, dict]]:
    """core.json's tasks as ours, each with what nanochat says of its examples."""
    golden = data.load_json("core.json")
    listed = {task["label"]: task for task in (*golden["tasks"], *golden["models"][name]["own_tasks"])}
    found = []
    for record in golden["models"][name]["tasks"]:
        entry = listed[record["label"]]
        rows = [checked_row(row, entry["icl_task_type"]) for row in entry["data"]]
        baseline = entry["random_baseline"] / 100
        sizes = (entry["num_fewshot"], entry["continuation_delimiter"], baseline, rows)
        found.append((CoreTask(entry["label"], entry["icl_task_type"], *sizes), record))
    return found


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer.load(data.path(f"checkpoints/{name}/tokenizer"))


@functools.cache
def span_scores_of(name: str):
    """Compiled once for all tests, four examples in a pass."""
    return make_span_scores(models.load(name)[0], make_mesh("data=1"), tokenizer_of(name).bos, rows=4)


def spans(name: str, task: CoreTask, index: int):
    return core.spans_of(task, index, core.tokenize(tokenizer_of(name), core.texts_of(task, index)))


@pytest.mark.parametrize("name", named("core.json"))
def test_examples_texts_and_tokens_are_nanochats(name):
    for task, record in tasks_of(name):
        for example in record["examples"]:
            index = example["index"]
            assert core.draw_examples(task.fewshot, index, len(task.rows)) == example["fewshot"]
            assert core.texts_of(task, index) == example["prompts"], (task.label, index)
            if "error" in example:
                with pytest.raises(ValueError, match="this tokenizer joins the two"):
                    spans(name, task, index)
                continue
            found = spans(name, task, index)
            assert [span.ids.tolist() for span in found] == example["tokens"], (task.label, index)
            assert [span.start for span in found] == example["start"], (task.label, index)
            assert [span.end for span in found] == example["end"], (task.label, index)


@pytest.mark.parametrize("name", named("core.json"))
def test_losses_choices_and_accuracies_are_nanochats(name):
    params, span_scores = models.load(name)[1], span_scores_of(name)
    golden = data.load_json("core.json")["models"][name]
    results = {}
    for task, record in tasks_of(name):
        examples = [example for example in record["examples"] if "error" not in example]
        of_examples = [spans(name, task, example["index"]) for example in examples]
        scores = span_scores(params, of_examples)
        right = []
        for example, own in zip(examples, scores, strict=True):
            if expected := example.get("mean_losses"):
                np.testing.assert_allclose([score.mean_loss for score in own], expected, atol=1e-4)
            right.append(core.is_right(task, example["index"], own))
            assert right[-1] == example["correct"], (task.label, example["index"])
        results[task.label] = core.CoreResult(np.array(right), 0, task.baseline)
    for label, result in results.items():
        assert result.accuracy.value == pytest.approx(golden["results"][label]["accuracy"], rel=1e-6)
        assert result.centered == pytest.approx(golden["results"][label]["centered"], rel=1e-6, abs=1e-7)
    assert core.core_metric([*results.values()]) == pytest.approx(golden["core"], rel=1e-6)


@pytest.mark.parametrize("limit", ["-1", "5"])
@pytest.mark.parametrize("name", named("core_bundle/expected.json"))
def test_the_whole_evaluation_of_a_bundle_is_nanochats(name, limit):
    expected = data.load_json("core_bundle/expected.json")[name][limit]
    tasks = read_tasks(data.path("core_bundle/eval_bundle"), int(limit) if int(limit) > 0 else None)
    config, params, _ = models.load(name)
    evaluate = core.make_core_task(config.sequence_len, tokenizer_of(name), span_scores_of(name))
    results = {task.label: evaluate(params, task) for task in tasks}
    assert [*results] == [*expected["results"]]
    for label, result in results.items():
        assert result.accuracy.value == pytest.approx(expected["results"][label], rel=1e-6)
        assert math.isclose(result.centered, expected["centered_results"][label], rel_tol=1e-6, abs_tol=1e-7)
    assert core.core_metric([*results.values()]) == pytest.approx(expected["core_metric"], rel=1e-6)
    assert results["longer than the context"].beyond_context == len(results["longer than the context"].right)
