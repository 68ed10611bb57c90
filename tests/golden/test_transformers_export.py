"""Every golden checkpoint, exported for transformers, has the original's logits and greedy text there.

Run: python -m pytest tests/golden/test_transformers_export.py
"""

import json

import numpy as np
import pytest

from nanochat_jax.checkpoints import find
from nanochat_jax.interop import transformers_model
from nanochat_jax.nanochat_export import describe, export_for_transformers
from nanochat_jax.tokenizer import Tokenizer
from tests.golden import data
from tests.golden.models import UNROUNDED, built, load
from tests.support.compare import needs_transformers, run_transformers

ATOL, RTOL = 2e-4, 1e-4  # of logits, see the golden folder's README
MARGIN = 1e-3  # between the two likeliest tokens, below which rounding decides
PROMPTS = 4
CHECKPOINTS = data.checkpoints()
COMPARED = [name for name in CHECKPOINTS if (data.GOLDEN / "forward" / f"{name}.npz").exists()] or ["(none)"]
every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)
every_compared = pytest.mark.parametrize("name", COMPARED)


def arrays_of(folder: str, name: str) -> data.Record:
    """Of forward/ or decode/: with unrounded rotary tables, as transformers has them, where there are such arrays."""
    unrounded = f"{folder}/{name}{UNROUNDED}.npz"
    return data.arrays(unrounded if (data.GOLDEN / unrounded).exists() else f"{folder}/{name}.npz")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for name in CHECKPOINTS:
        data.path(f"checkpoints/{name}/base_checkpoints")
        base = data.GOLDEN / "checkpoints" / name
        found = find.find_model("base", base=base)
        card = describe(found, name)
        tokenizer = Tokenizer.load(base / "tokenizer")
        export_for_transformers(found, tokenizer, root / name / "model", "float32", card, log=lambda line: None)
    return root


@pytest.fixture(scope="module")
def compared(exported):
    """Those folders with what transformers computes on the golden inputs."""
    for name in COMPARED:
        forward, decode = arrays_of("forward", name), arrays_of("decode", name)
        inputs = {key: array for key in ("t1", "t2", "t3") if (array := forward.get(f"{key}_ids")) is not None}
        inputs = {f"ids_{key}": array for key, array in inputs.items()}
        for k in range(PROMPTS):
            if f"prompt{k}" in decode:
                inputs |= {f"prompt_{k}": decode[f"prompt{k}"], f"new_{k}": len(decode[f"tokens{k}"])}
        np.savez(exported / name / "inputs.npz", **inputs)
    run_transformers(*(exported / name for name in COMPARED))
    return exported


@every_checkpoint
def test_an_exported_model_is_read_back_with_the_same_logits(exported, name):
    config, params, _ = load(name)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, config.sequence_len + 40), dtype=np.int32)
    again = built(*transformers_model.read_model(exported / name / "model"))(ids)
    assert np.array_equal(np.asarray(again), np.asarray(built(config, params)(ids)))


@needs_transformers
@every_compared
def test_transformers_has_the_originals_logits(compared, name):
    forward = arrays_of("forward", name)
    with np.load(compared / name / "outputs.npz") as got:
        assert got["class"] == ("NanoChatForCausalLM" if name.startswith("c3") else "NanochatJaxForCausalLM")
        keys = [key.removeprefix("logits_") for key in got.files if key.startswith("logits_")]
        assert keys
        for key in keys:
            logits = got[f"logits_{key}"][:, forward[f"{key}_positions"]]
            np.testing.assert_allclose(logits, forward[f"{key}_logits"], atol=ATOL, rtol=RTOL, err_msg=key)


@needs_transformers
@every_compared
def test_transformers_writes_the_originals_greedy_text(compared, name):
    decode, compared_tokens = arrays_of("decode", name), 0
    with np.load(compared / name / "outputs.npz") as got:
        for k in range(PROMPTS):
            if f"tokens_{k}" not in got.files:
                continue
            want, sure = decode[f"tokens{k}"], decode[f"margin{k}"] > MARGIN
            forced = decode[f"mask{k}"] == 0  # by the calculator, which transformers does not have
            end = min([len(want), *np.flatnonzero(~sure)[:1], *np.flatnonzero(forced)[:1]])
            assert np.array_equal(got[f"tokens_{k}"][:end], want[:end]), k
            compared_tokens += end
    assert compared_tokens > 20


def test_the_tokenizers_file_is_equal_to_the_librarys_own(exported):
    name = "c3_oct2025"
    theirs = data.load_json(f"hf/{name}/tokenizer.json")
    ours = json.loads((exported / name / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"] and ours["model"]["merges"] == theirs["model"]["merges"]
    split, their_split = (one["pre_tokenizer"]["pretokenizers"][0] for one in (ours, theirs))
    assert split == their_split and ours["normalizer"] is theirs["normalizer"] is None
    assert [(t["id"], t["content"]) for t in ours["added_tokens"]] == [
        (t["id"], t["content"]) for t in theirs["added_tokens"]
    ]
