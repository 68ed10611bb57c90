"""The list of models, of both formats, whatever state the folders are in."""

import json
import os

import pytest

from nanochat_jax import models
from nanochat_jax.checkpoints import find
from nanochat_jax.checkpoints.store import write
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.flags.models import ModelsConfig
from tests.reports.folders import result
from tests.support import tiny
from tests.support.models import random_params


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base model of nanochat's, an SFT model of ours that comes from it, and folders that hold none."""
    tiny.write_nanochat_base(tmp_path)
    settings = {"output_tag": "mine", "source": "base", "model_tag": "d2", "model_step": 7}
    config = {"sequence_len": 64, "vocab_size": 265, "padded_vocab": 320, "n_layer": 2}
    _, groups = tiny.random_state()
    meta = tiny.meta(groups, step=5) | {"total_steps": 9, "user_config": settings, "val_bpb": 1.25}
    folder = tmp_path / "chatsft_checkpoints" / "mine"
    for step in (3, 5):
        write(folder / str(step), flatten_by_path(random_params(tiny.CONFIG)), None, meta)
    (tmp_path / "chatsft_checkpoints" / "d9").mkdir()
    assert config["n_layer"] == tiny.CONFIG.n_layer
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def test_models_of_both_formats_are_listed_with_their_facts(base, capsys):
    assert models.main(ModelsConfig(json=True)) == 0
    theirs, ours = map(json.loads, capsys.readouterr().out.splitlines())
    assert (theirs["stage"], theirs["tag"], theirs["format"]) == ("base", "d2", "nanochat")
    assert (ours["stage"], ours["tag"], ours["steps"], ours["format"]) == ("sft", "mine", [3, 5], "ours")
    assert ours["from"] == "base d2, step 7" and ours["measured"] == {"val_bpb": 1.25} and ours["total_steps"] == 9
    files = [path for path in (base / "chatsft_checkpoints/mine/5").rglob("*") if path.is_file()]
    assert ours["bytes"] == sum(os.path.getsize(path) for path in files) and ours["parameters"] > 10_000
    assert models.main(ModelsConfig()) == 0
    said = capsys.readouterr().out
    assert "3, 5 of 9" in said and "val_bpb" in said and "nanochat" in said and "d9" not in said


def test_what_eval_has_kept_of_a_model_is_shown_the_newest_of_each_task(base, capsys):
    folder = base / "chatsft_checkpoints" / "mine"
    mine = find.identity(find.Found(folder, 5, True))
    other = find.identity(find.Found(folder, 3, True))
    for name, checkpoint, when, tasks in (
        ("a", mine, 2, {"GSM8K": 0.5}),
        ("b", mine, 1, {"GSM8K": 0.25, "MMLU": 0.125}),
        ("c", other, 3, {"GSM8K": 0.75}),
        ("d", mine.replace("mine", "overwritten"), 4, {"GSM8K": 0.875}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(result(5, **tasks) | {"checkpoint": checkpoint, "time": when}))
    assert models.main(ModelsConfig(json=True)) == 0
    theirs, ours = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours["evaluated"] == {"GSM8K": 0.5, "MMLU": 0.125} and theirs["evaluated"] == {}
    assert models.main(ModelsConfig()) == 0
    assert "val_bpb 1.25; eval: GSM8K 50.0%, MMLU 12.5%" in capsys.readouterr().out


def test_a_damaged_model_is_a_line_and_not_the_end(base, capsys):
    (base / "chatsft_checkpoints/mine/5/meta/data.json").write_bytes(b"\xff")
    assert models.main(ModelsConfig(json=True)) == 0
    theirs, ours = map(json.loads, capsys.readouterr().out.splitlines())
    assert "error" not in theirs and ": " in ours["error"]
    assert models.main(ModelsConfig()) == 0
    assert "cannot be read" in capsys.readouterr().out


def test_an_empty_base_directory_says_where_was_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert models.main(ModelsConfig()) == 0
    assert capsys.readouterr().out == f"no models in {tmp_path} (NANOCHAT_BASE_DIR names another folder)\n"
