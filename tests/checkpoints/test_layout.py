"""Where in a listing of files the models are, and how a repository is named.

Run: python -m pytest tests/checkpoints/test_layout.py
"""

import contextlib
import json
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.checkpoints.layout import (
    FLAT,
    TRANSFORMERS,
    TREE,
    Place,
    choose,
    enclosing,
    find_place,
    read_address,
    stage_of,
)
from tests.golden import data

STEP = ["model_000007.pt", "meta_000007.json"]
PARTS = st.sampled_from(
    [*STEP, "config.json", "model.safetensors", "base_checkpoints", "d2", "7", "INTEGRITY.json", "x"]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:o/n", ("o/n", "main", "")),
        ("hub:o/n/", ("o/n", "main", "")),
        ("hub:o/n.x-y_z@v1.0", ("o/n.x-y_z", "v1.0", "")),
        ("hub:o/n@refs/pr/1", ("o/n", "refs/pr/1", "")),
        ("hub:o/n@refs/pr/1/runs/d20", ("o/n", "refs/pr/1", "runs/d20")),
        ("hub:o/n@v1/refs/pr/1", ("o/n", "v1", "refs/pr/1")),
        ("hub:o/n@feature%2Fx/d20", ("o/n", "feature/x", "d20")),
        ("hub:o/n/a@b", ("o/n", "main", "a@b")),
    ],
)
def test_an_address_is_read_in_one_way(text, expected):
    assert tuple(read_address(text)) == expected


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["base_checkpoints/d2/model_000007.pt"], Place("", TREE)),
        (["a/b/chatrl_checkpoints/d2/model_000007.pt"], Place("a/b", TREE)),
        (["a/base_checkpoints/mine/7/INTEGRITY.json"], Place("a", TREE)),
        (STEP, Place("", FLAT)),
        (["a/model_0000007.pt"], Place("a", FLAT)),
        (["config.json", "model.safetensors"], Place("", TRANSFORMERS)),
        (["a/config.json", "a/model.safetensors.index.json"], Place("a", TRANSFORMERS)),
        ([*STEP, "config.json", "model.safetensors"], Place("", FLAT)),  # nanochat's own file is the original
        ([*STEP, "a/config.json", "a/model.safetensors"], Place("", FLAT)),  # the folder itself comes first
    ],
)
def test_a_place_is_known_by_the_names_in_it(paths, expected):
    assert find_place(paths) == expected


def test_a_folder_in_a_tree_stands_for_the_tree():
    path = PurePosixPath("/x/chatsft_checkpoints/d20")
    assert enclosing(path) == (PurePosixPath("/x"), "sft", "d20")
    assert enclosing(path.parent) == (PurePosixPath("/x"), "sft", None)
    assert enclosing(path.parent.parent) == (PurePosixPath("/x"), None, None)


def test_a_model_without_its_meta_file_is_not_complete():
    paths = [*STEP, "model_000009.pt", "tokenizer.pkl"]
    assert choose(paths, Place("", FLAT), "base").step == 7
    with pytest.raises(ValueError, match="has no complete checkpoint: a model_"):
        choose(["model_000009.pt", "tokenizer.pkl"], Place("", FLAT), "base")


@given(st.lists(st.lists(PARTS, min_size=1, max_size=5).map("/".join), max_size=8))
def test_of_any_listing_files_that_are_in_it_are_chosen_or_it_is_refused(paths):
    paths = [*paths, "tokenizer.json"]
    with contextlib.suppress(ValueError):
        files = choose(paths, find_place(paths), "base").files
        assert set(files) <= set(paths) and "tokenizer.json" in files


def test_the_stage_of_nanochats_own_metadata_is_known():
    for name in data.checkpoints():
        for file in data.path(f"checkpoints/{name}").glob("base_checkpoints/*/meta_*.json"):
            assert stage_of(json.loads(file.read_text())) == "base"
    trace = data.load_json("sft_run/trace.json")
    assert stage_of(trace["full_epoch"]["final_meta"]) == "sft"
    assert stage_of({"step": 1, "model_config": {}, "user_config": {"run": "x", "init_lr_frac": 1.0}}) == "mid"
    assert stage_of({"step": 1, "model_config": {}, "user_config": 3}) is None
