"""Every checkpoint of today's nanochat in the golden folder is written again as it was, read in place or converted."""

import json

import numpy as np
import pytest

from nanochat_jax import nanochat_import
from nanochat_jax.checkpoints import find
from nanochat_jax.files.tiktoken_read import read_tokenizer_pickle
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.interop.nanochat_model import find_era, read_model
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.nanochat_write import EMBEDDING_TYPES
from nanochat_jax.nanochat_export import export
from nanochat_jax.tokenizer import Tokenizer
from tests.files.test_torch_read import equal
from tests.golden import data


def original(name):
    """(base directory, model) of a golden checkpoint."""
    base = data.path(f"checkpoints/{name}")
    data.path(f"checkpoints/{name}/base_checkpoints")
    return base, find.find_model("base", base=base)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", data.checkpoints())
def test_the_files_are_equal_to_those_of_the_golden_folder(name, converted, tmp_path):
    base, found = original(name)
    model_file = f"model_{found.step:06d}.pt"
    tensors = read_pt(found.folder / model_file)
    if find_era(tensors) != "E":
        pytest.skip(f"{name} is of era {find_era(tensors)}")
    source = found
    if converted:
        nanochat_import.convert(base, tmp_path / "ours", log=lambda line: None)
        source = find.find_model("base", base=tmp_path / "ours")
    folder = tmp_path / "out/base_checkpoints" / found.tag
    plain = {key.removeprefix("_orig_mod."): tensor for key, tensor in tensors.items()}
    kind = plain["transformer.wte.weight"].dtype.name
    tokenizer = Tokenizer.load(base / "tokenizer")
    export(source, tokenizer, folder, EMBEDDING_TYPES[kind], log=lambda line: None)

    again = read_pt(folder / model_file)
    assert again.keys() == plain.keys()
    assert all(equal(again[key], tensor) for key, tensor in plain.items())
    config, _, meta = read_model(found.folder, found.step)
    config_again, _, meta_again = read_model(folder, found.step)
    assert config_again == config
    assert json.dumps(meta_again) == json.dumps(meta)

    state, state_again = (read_optimizer(f, found.step, config) for f in (found.folder, folder))
    assert (state is None) == (state_again is None)
    if state:
        assert state_again.groups == state.groups and state_again.arrays.keys() == state.arrays.keys()
        assert all(np.array_equal(state_again.arrays[name], array) for name, array in state.arrays.items())
        ranks = list(found.folder.glob(f"optim_{found.step:06d}_rank*.pt"))
        if len(ranks) == 1:
            assert equal(read_pt(folder / ranks[0].name), read_pt(ranks[0])), "types, order and settings are nanochat's"

    tables = read_tokenizer_pickle(tmp_path / "out/tokenizer/tokenizer.pkl")
    assert equal(tables, read_tokenizer_pickle(base / "tokenizer/tokenizer.pkl"))
    assert np.array_equal(read_pt(tmp_path / "out/tokenizer/token_bytes.pt"), tokenizer.token_bytes())


@pytest.mark.parametrize("name", data.checkpoints())
def test_older_networks_are_refused_in_one_sentence_and_nothing_is_written(name, tmp_path):
    base, found = original(name)
    if find_era(read_pt(found.folder / f"model_{found.step:06d}.pt")) == "E":
        pytest.skip(f"{name} is of today")
    nanochat_import.convert(base, tmp_path / "ours", log=lambda line: None)
    tokenizer = Tokenizer.load(base / "tokenizer")
    for source in (found, find.find_model("base", base=tmp_path / "ours")):
        with pytest.raises(ValueError, match=r"only networks as nanochat builds them .* qk_scale=1\.") as error:
            export(source, tokenizer, tmp_path / "out/base_checkpoints/d", EMBEDDING_TYPES["float32"])
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
