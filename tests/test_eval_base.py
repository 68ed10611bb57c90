"""The evaluation of a base model: CORE, bits per byte and samples, what is printed and kept, and while base trains.

Run: python -m pytest tests/test_eval_base.py
"""

import csv
import functools
import json
import re

import numpy as np
import pytest

from nanochat_jax import base as stage
from nanochat_jax import eval as evaluation
from nanochat_jax import models
from nanochat_jax.evals.core import centered
from nanochat_jax.reports.runs import read_run
from nanochat_jax.reports.tables import Shown, evaluations
from nanochat_jax.train.metrics import read_metrics
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.core_files import TASKS, write_bundle

LABELS = [entry["label"] for entry, _, _ in TASKS]
run = functools.partial(
    run_command, evaluation.main, evaluation.EvalConfig, "-i", "base", "--mesh", "data=1", "-b", "2"
)


@pytest.fixture(scope="module")
def files(base):
    """The base directory with CORE's tasks and a few documents."""
    write_bundle(base / "eval_bundle")
    tiny.write_shards(base / "base_data_climbmix", sizes=(3, 20))
    return base


@pytest.fixture
def here(files, in_base):
    return files


def kept(base):
    """The results in the model's folder, the newest last."""
    return sorted((base / "base_checkpoints" / "d2").glob("eval_*.json"))


def test_core_bits_per_byte_and_samples_are_printed_and_kept_with_tasks_beside_them(here, capsys):
    assert run("-a", "core|BPB|sample|Arithmetic", "--max-per-task", "3", "-m", "4", "--split-tokens", "400") == 0
    out, report = capsys.readouterr().out, json.loads(kept(here)[-1].read_text())
    assert [*report["tasks"]] == ["Arithmetic"] and report["chatcore"] is None
    assert 0 < report["val_bpb"] < 20 and report["val_tokens"] == 6 * 64 and report["document_mask"] is False
    assert f"bits per byte: {report['val_bpb']:.6f}" in out
    assert len(report["samples"]) == 6 and all(f"sample: {text}" in out for text in report["samples"])
    assert [*report["core"]] == LABELS
    for (_, baseline, _), record in zip(TASKS, report["core"].values()):
        share = record["accuracy"]
        assert record["problems"] == 3 == len(record["right"]) and share["value"] == np.mean(record["right"])
        assert share["low"] <= share["value"] <= share["high"]
        assert record["centered"] == pytest.approx(centered(share["value"], baseline / 100))
    assert report["core_metric"] == pytest.approx(np.mean([record["centered"] for record in report["core"].values()]))
    assert f"CORE: {report['core_metric']:.4f}, of the first 3 examples of each task" in out
    beyond = report["core"]["which"]["beyond_context"]
    assert f"{beyond} are longer than the model's context, and nothing is cropped" in out


def test_nanochats_file_has_its_name_and_columns_and_is_never_written_over(here, capsys):
    folder = here / "base_eval"
    for path in folder.glob("*"):
        path.unlink()
    assert run("-a", "CORE") == 0
    (file,) = folder.iterdir()
    assert file.name == "base_model_000007.csv" and f"The result is in {file}" in capsys.readouterr().out
    first = file.read_text()
    header, *rows = ([cell.strip() for cell in row] for row in csv.reader(first.splitlines(), skipinitialspace=True))
    assert header == ["Task", "Accuracy", "Centered"] and [row[0] for row in rows] == [*LABELS, "CORE"]
    report = json.loads(kept(here)[-1].read_text())
    assert [float(row[1]) for row in rows[:-1]] == [
        pytest.approx(record["accuracy"]["value"], abs=1e-6) for record in report["core"].values()
    ]
    assert float(rows[-1][2]) == pytest.approx(report["core_metric"], abs=1e-6)
    assert run("-a", "CORE", "-x", "3") == 0
    assert file.read_text() == first and len([*folder.iterdir()]) == 2


def test_the_newest_core_is_in_the_list_of_models_and_all_are_on_the_page_of_reports(here, capsys):
    assert run("-a", "CORE|Arithmetic", "-x", "3", "-m", "4") == 0
    report = json.loads(kept(here)[-1].read_text())
    capsys.readouterr()
    assert run_command(models.main, models.ModelsConfig) == 0
    assert f"core_metric {report['core_metric']:.4g}" in capsys.readouterr().out
    shown = evaluations(Shown(0, "d2", "d2", read_run(here / "base_checkpoints" / "d2")))
    assert "<th>CORE</th>" in shown and f"<td>{report['core_metric']:.4f}</td>" in shown
    assert all(f"<th>CORE: {label}</th>" in shown for label in LABELS) and "centred" in shown


def test_a_core_of_another_form_is_left_out_of_the_page(here):
    path = kept(here)[-1]
    facts = json.loads(path.read_text())
    for spoiled in ("x", {"which": 1}, {"which": {"problems": 1}}):
        path.write_text(json.dumps(facts | {"core": spoiled}))
        assert read_run(path.parent).evaluations[-1].core == {}
    path.write_text(json.dumps(facts))


def test_too_few_examples_are_said_before_anything_is_evaluated(here, capsys):
    said = run("-a", "CORE|sample", "-x", "2")
    assert said.startswith("error: which shows 2 other examples before each, so it needs at least 3, got 2")
    assert "sample: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["-a", "CORES"],
            "-a must name tasks among ARC-Easy, .*, CORE, bpb, sample, or module:Class, got 'CORES'; did ",
        ),
        (["-a", "bpb", "--eval-tokens", "0"], "--eval-tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_one_sentence(here, argv, sentence):
    said = run(*argv)
    assert re.match(f"error: {sentence}", said) and "\n" not in said


def test_without_files_and_downloads_the_reason_is_a_sentence(in_base, tmp_path, monkeypatch):
    tiny.write_base(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    said = run("-a", "CORE")
    assert said.startswith("error: ") and "eval_bundle.zip is not downloaded because HF_HUB_OFFLINE is set" in said
    assert run("-a", "bpb").startswith("error: no pretraining data, ")


# ------------------------------------------------------------------------------------------------ while base runs
def test_base_measures_core_as_it_trains_and_at_the_end(here, capsys):
    argv = [*tiny.base_flags(here), "--model-tag", "measured", "--num-iterations", "3", "--eval-every", "-1"]
    core = ["--core-every", "2", "--core-max-per-task", "3", "--mesh", "data=1"]
    assert run_command(stage.main, stage.BaseConfig, *argv, *core) == 0
    out = capsys.readouterr().out
    folder = here / "base_checkpoints" / "measured"
    found = {r["step"]: r for r in read_metrics(folder / "metrics.jsonl") if "core_metric" in r}
    assert [*found] == [2, 3]
    for step, record in found.items():
        by_task = {name: value for name, value in record.items() if name.startswith("centered_results/")}
        assert [*by_task] == [f"centered_results/{label}" for label in LABELS]
        assert record["core_metric"] == pytest.approx(np.mean([*by_task.values()]))
        assert f"step {step:05d} | core_metric {record['core_metric']:.4f}\n" in out
    assert "CORE: " in out.partition("Done: ")[2]
    meta = models.describe(evaluation.find.find_model("base", "measured"))
    assert meta["measured"]["core_metric"] == found[3]["core_metric"]


def test_base_says_that_cores_tasks_are_missing_before_it_trains(in_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    argv = [*tiny.base_flags(tmp_path), "--num-iterations", "1", "--core-every", "1", "--mesh", "data=1"]
    assert "eval_bundle.zip is not downloaded" in run_command(stage.main, stage.BaseConfig, *argv)
    assert "step 00001" not in capsys.readouterr().out
