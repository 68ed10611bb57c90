"""Models in the form of transformers against what that library computed, and against nanochat's own files of them.

Run: python -m pytest tests/golden/test_transformers.py
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanochat_jax.checkpoints import find
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.model.gpt import abstract_gpt
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.golden import data

NAME = "c3_oct2025"


@pytest.fixture(scope="module")
def found():
    return find.find_model("base", base=data.path(f"hf/{NAME}"))


@nnx.jit
def logits_of(model, ids):
    return model(ids)


def test_the_logits_are_those_of_the_librarys_class(found):
    config, params, _ = find.load_params(found)
    expected = data.arrays(f"hf/{NAME}.npz")
    model = nnx.merge(abstract_gpt(config)[0], jax.tree.map(jnp.asarray, params))
    for text in ("t1", "t2", "t3"):
        logits = np.asarray(logits_of(model, jnp.asarray(expected[f"{text}_ids"])))
        np.testing.assert_allclose(
            logits[:, expected[f"{text}_positions"]], expected[f"{text}_logits"], atol=2e-4, rtol=1e-4
        )


def test_its_parameters_and_network_are_those_of_nanochats_own_files(found):
    theirs = find.find_model("base", base=data.path(f"checkpoints/{NAME}"))
    (config, params, _), (original, expected, _) = find.load_params(found), find.load_params(theirs)
    assert config == original
    expected = flatten_by_path(expected)
    for name, leaf in flatten_by_path(params).items():
        assert np.array_equal(leaf, expected[name]), name


def test_its_tokenizer_is_nanochats_and_gives_the_librarys_ids_but_for_written_special_tokens(found):
    tokenizer = Tokenizer.load(found.tokenizer)
    assert tokenizer.digest() == Tokenizer.load(data.path(f"checkpoints/{NAME}/tokenizer")).digest()
    for row in json.loads(data.path(f"hf/{NAME}_tokens.json").read_text(encoding="utf-8")):
        ids = tokenizer.encode(row["text"])
        assert ids == row["tiktoken_ordinary"]
        assert (ids == row["hf"]) is not any(token in row["text"] for token in SPECIAL_TOKENS)
