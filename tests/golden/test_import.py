"""Every checkpoint that nanochat itself wrote into the golden folder is read, bit for bit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax.checkpoints.find import tags_by_time
from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.files.tiktoken_read import read_tokenizer_pickle
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.interop.nanochat_model import (
    era_config,
    find_era,
    find_steps,
    nanochat_name,
    our_path,
    read_model,
    strip_prefix,
    tensor_shapes,
)
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.optimizer_state import group_paths
from tests.golden import data
from tests.support.torch_files import write_pt


def checkpoint(name: str) -> tuple[Path, int]:
    base = data.path(f"checkpoints/{name}/base_checkpoints")
    folder = base / tags_by_time(base)[0]
    return folder, find_steps(folder)[-1]


def leaf(params: dict, path: tuple):
    for part in path:
        params = params[part]
    return params


@pytest.mark.parametrize("name", data.checkpoints())
def test_every_tensor_of_the_file_is_read_bit_for_bit_and_nothing_is_made_up(name):
    folder, step = checkpoint(name)
    config, params, meta = read_model(folder, step)
    raw = strip_prefix(read_pt(folder / f"model_{step:06d}.pt"))
    assert meta == json.loads((folder / f"meta_{step:06d}.json").read_text())
    shapes = tensor_shapes(config)
    assert {nanochat_name(path) for path in shapes} == raw.keys()
    for key, tensor in raw.items():
        path = our_path(key)
        assert nanochat_name(path) == key and shapes["/".join(map(str, path))] == tensor.shape
        got = leaf(params, path)
        assert got.dtype == np.float32
        assert got.astype(tensor.dtype).tobytes() == tensor.tobytes(), f"{key} differs from the file"


@pytest.mark.parametrize("name", data.checkpoints())
def test_the_era_is_the_one_whose_tensors_the_file_has(name):
    """The other eras' configs ask for other tensors (D and E, too: smear), so only one era fits a file."""
    folder, step = checkpoint(name)
    config, _, meta = read_model(folder, step)
    raw = strip_prefix(read_pt(folder / f"model_{step:06d}.pt"))
    sizes = {"window_pattern": "L"} | meta["model_config"]
    fits = []
    for era in "ABCDE":
        try:
            shapes = tensor_shapes(era_config(era, sizes, raw))
        except Refused:  # too narrow for this era's gates
            continue
        if {nanochat_name(path): shape for path, shape in shapes.items()} == {k: t.shape for k, t in raw.items()}:
            fits.append(era)
    assert fits == [find_era(raw)]
    assert config.windows[-1] in (-1, config.sequence_len) and config.n_layer == len(config.windows)


def optimizers(pattern: str = "optim_*.pt") -> list[str]:
    """Checkpoints that come with one optimizer file of this kind."""
    folders = {name: data.GOLDEN / "checkpoints" / name / "base_checkpoints" for name in data.checkpoints()}
    return [name for name, folder in folders.items() if len([*folder.glob(f"*/{pattern}")]) == 1] or ["(none)"]


@pytest.mark.parametrize("name", optimizers())
def test_optimizer_states_are_read_whole_and_unchanged(name):
    folder, step = checkpoint(name)
    config, _, _ = read_model(folder, step)
    groups, arrays = read_optimizer(folder, step, config)
    shapes = tensor_shapes(config)
    by_kind = {}
    for name, array in arrays.items():
        kind, _, path = name.partition("/")
        by_kind.setdefault(kind, {})[path] = array
    counts = by_kind.pop("count")
    assert counts.keys() == groups.keys() - {"matrix"} and len({int(count) for count in counts.values()}) == 1
    assert by_kind["exp_avg"].keys() == by_kind["exp_avg_sq"].keys()
    assert by_kind["momentum"].keys() == by_kind["second_momentum"].keys()
    assert sorted([*by_kind["exp_avg"], *by_kind["momentum"]]) == sorted(shapes), "every parameter has one state"
    for kind in ("exp_avg", "exp_avg_sq", "momentum"):
        assert all(array.shape == shapes[path] and array.dtype == np.float32 for path, array in by_kind[kind].items())
    if groups["matrix"].beta2 is None:  # which the file has not
        assert not any(array.any() for array in by_kind.pop("second_momentum").values())

    (file,) = folder.glob(f"optim_{step:06d}*.pt")
    content = read_pt(file)
    parts = content if isinstance(content, list) else [content]
    stored = [array for part in parts for entry in part["state"].values() for array in entry.values()]
    stored = [array.astype("f4") for array in stored if isinstance(array, np.ndarray) and array.ndim]
    read = [array for of_kind in by_kind.values() for array in of_kind.values()]
    assert sum(array.size for array in stored) == sum(array.size for array in read)
    total = sum(float(np.abs(array).sum(dtype=np.float64)) for array in stored)
    assert np.isclose(sum(float(np.abs(array).sum(dtype=np.float64)) for array in read), total, rtol=1e-12)


@pytest.mark.parametrize("name", data.names("optim", "_groups.json"))
def test_group_members_are_in_nanochats_own_order(name):
    table = data.load_json(f"optim/{name}_groups.json")["groups_after_step_3"]
    folder, step = checkpoint(name)
    data.path(f"{folder}/optim_{step:06d}_rank0.pt")
    config, _, _ = read_model(folder, step)
    shapes = tensor_shapes(config)
    groups = group_paths(shapes)
    for group in table:
        paths = ["/".join(map(str, our_path(name))) for name in group["params"]]
        if group["kind"] == "muon":
            assert paths == [path for path in groups["matrix"] if shapes[path] == tuple(group["shapes"][0])]
        else:
            assert paths in groups.values()
    assert list(read_optimizer(folder, step, config).groups) == list(groups)
    assert list(groups)[-1] == "matrix"


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("name", optimizers("optim_*_rank0.pt"))
def test_a_real_state_split_over_ranks_as_nanochat_does_is_merged_again(tmp_path, name, world):
    folder, step = checkpoint(name)
    config, _, _ = read_model(folder, step)
    want = read_optimizer(folder, step, config)
    whole = read_pt(folder / f"optim_{step:06d}_rank0.pt")
    sizes = {group["params"][0]: len(group["params"]) for group in whole["param_groups"] if group["kind"] == "muon"}

    def part(number: int, array, rank: int):
        if not isinstance(array, np.ndarray):
            return array
        if number not in sizes:
            rows = len(array) // world
            return array[rank * rows : (rank + 1) * rows] if array.size >= 1024 else array
        chunk = -(-sizes[number] // world)
        padded = np.zeros((chunk, *array.shape[1:]), array.dtype)
        own = array[rank * chunk : (rank + 1) * chunk]
        padded[: len(own)] = own
        return padded

    for rank in range(world):
        state = {n: {key: part(n, a, rank) for key, a in entry.items()} for n, entry in whole["state"].items()}
        write_pt(tmp_path / f"optim_{step:06d}_rank{rank}.pt", whole | {"state": state})
    got = read_optimizer(tmp_path, step, config)
    assert got.groups == want.groups and got.arrays.keys() == want.arrays.keys()
    assert all(np.array_equal(got.arrays[name], array) for name, array in want.arrays.items())


@pytest.mark.parametrize("name", data.checkpoints())
def test_tokenizers_are_read_with_as_many_tokens_as_the_model_has(name):
    tokenizer = read_tokenizer_pickle(data.path(f"checkpoints/{name}/tokenizer/tokenizer.pkl"))
    folder, step = checkpoint(name)
    config, _, _ = read_model(folder, step)
    ids = sorted([*tokenizer["mergeable_ranks"].values(), *tokenizer["special_tokens"].values()])
    assert ids == list(range(config.vocab_size))
    assert list(tokenizer["special_tokens"].values()) == list(range(config.vocab_size - 9, config.vocab_size))
    assert all(re.fullmatch(r"<\|\w+\|>", token) for token in tokenizer["special_tokens"])
    token_bytes = read_pt(data.path(f"checkpoints/{name}/tokenizer/token_bytes.pt"))
    assert token_bytes.shape == (config.vocab_size,) and not token_bytes[-9:].any()
