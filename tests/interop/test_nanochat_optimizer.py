"""nanochat's optimizer files of every form, cut over ranks as nanochat does, are put together or refused by name."""

import numpy as np
import pytest

from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.interop.nanochat_model import read_model, tensor_shapes
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.optimizer_state import AdamWGroup, MuonGroup
from tests.interop.test_nanochat_model import model, write_model
from tests.support.torch_files import write_pt

BLOCK_ORDER = ["attn/c_q", "attn/c_k", "attn/c_v", "attn/c_proj", "attn/ve_gate", "mlp/c_fc", "mlp/c_proj"]
ADAMW = {"lr": 0.1, "initial_lr": 0.2, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.01}
MUON = {"lr": 0.01, "initial_lr": 0.02, "momentum": 0.95}


def optimizer_state(era: str, config):
    """(the arrays that read_optimizer must return, the paths of AdamW's and of Muon's groups) of a random state."""
    rng = np.random.default_rng(5)
    shapes = tensor_shapes(config)
    order = [f"blocks/{i}/{part}" for i in range(3) for part in BLOCK_ORDER if f"blocks/{i}/{part}" in shapes]
    embeds = [path for path in shapes if path.endswith("value_embed")]
    adamw = {
        "unembedding": ["lm_head"],
        "embedding": ["wte"],
        "value_embedding": embeds,
        "resid": ["resid_lambdas"],
        "x0": ["x0_lambdas"],
        "smear": ["smear_gate", "smear_lambda", "backout_lambda"],
    }
    adamw = {name: group for name, group in adamw.items() if group and group[0] in shapes}
    want = {f"count/{name}": np.int32(11) for name in adamw}
    for path in [path for group in adamw.values() for path in group]:
        want[f"exp_avg/{path}"], want[f"exp_avg_sq/{path}"] = rng.normal(size=(2, *shapes[path])).astype("f4")
    for path in order:
        r, c = shapes[path]
        want[f"momentum/{path}"] = rng.normal(size=(r, c)).astype("f4")
        second = rng.normal(size=(r, 1) if r >= c else (1, c)).astype("f4")
        want[f"second_momentum/{path}"] = second * (era != "A")  # which had none: it starts from zero
    muon = [[path for path in order if shapes[path] == shape] for shape in sorted({shapes[path] for path in order})]
    if era == "A":  # by number of elements
        sizes = sorted({int(np.prod(shapes[path])) for path in order})
        muon = [[path for path in order if np.prod(shapes[path]) == size] for size in sizes]
    return want, list(adamw.values()), muon


def rank_content(era: str, want: dict, adamw: list, muon: list, rank: int, world: int):
    """What the optimizer of one rank saves."""
    state, groups, second_part, number = {}, [], {"state": {}, "param_groups": []}, 0
    for group in adamw:
        numbers = []
        for path in group:
            pieces = {}
            for key in ("exp_avg", "exp_avg_sq"):
                array = want[f"{key}/{path}"]
                rows = len(array) // world
                pieces[key] = array[rank * rows : (rank + 1) * rows] if array.size >= 1024 else array
            step = np.array(11.0, "f4") if era == "A" else 11
            state[number] = {"step": step, **pieces}
            numbers.append(number)
            number += 1
        groups.append(ADAMW | {"params": numbers} | ({} if era == "A" else {"kind": "adamw"}))
    target = second_part if era == "A" else {"state": state, "param_groups": groups}
    number = 0 if era == "A" else number
    for group in muon:
        numbers = list(range(number, number + len(group)))
        number += len(group)
        if era == "A":  # one buffer a parameter, on the rank that owns it
            for k, path in enumerate(group):
                if k % world == rank:
                    target["state"][numbers[k]] = {"momentum_buffer": want[f"momentum/{path}"]}
            target["param_groups"].append(MUON | {"params": numbers, "zero_buffer": np.full(2, rank, "f4")})
            continue
        chunk = -(-len(group) // world)
        own = group[rank * chunk : (rank + 1) * chunk]
        entry = {}
        for key, name in (("momentum", "momentum_buffer"), ("second_momentum", "second_momentum_buffer")):
            padded = np.full((chunk, *want[f"{key}/{group[0]}"].shape), 9, "f4")
            padded[: len(own)] = [want[f"{key}/{path}"] for path in own] or padded[:0]
            entry[name] = padded
        target["state"][numbers[0]] = entry
        target["param_groups"].append(MUON | {"kind": "muon", "beta2": 0.9, "weight_decay": 0.1, "params": numbers})
    return [{"state": state, "param_groups": groups}, second_part] if era == "A" else target


def write_optimizer(folder, era, world, step=7):
    write_model(folder, model(era), step=step)
    config = read_model(folder, step)[0]
    want, adamw, muon = optimizer_state(era, config)
    contents = [rank_content(era, want, adamw, muon, rank, world) for rank in range(world)]
    for rank, content in enumerate(contents):
        write_pt(folder / f"optim_{step:06d}_rank{rank}.pt", content)
    return config, want, contents


@pytest.mark.parametrize("world", [1, 2, 8, 16])
@pytest.mark.parametrize("era", ["A", "C", "E"])
def test_the_parts_of_all_ranks_make_the_whole_state(tmp_path, era, world):
    config, want, _ = write_optimizer(tmp_path, era, world)
    got = read_optimizer(tmp_path, 7, config)
    assert got.arrays.keys() == want.keys()
    for name, array in want.items():
        assert got.arrays[name].dtype == array.dtype and np.array_equal(got.arrays[name], array), name
    names = ["unembedding", "embedding", "value_embedding", "resid", "x0", "smear", "matrix"]
    names = [name for name in names if era == "E" or name != "smear"]
    names = ["unembedding", "embedding", "matrix"] if era == "A" else names
    assert list(got.groups) == names
    assert got.groups["unembedding"] == AdamWGroup(kind="adamw", **ADAMW)
    decay, beta2 = (0.0, None) if era == "A" else (0.1, 0.9)
    assert got.groups["matrix"] == MuonGroup(kind="muon", **MUON, weight_decay=decay, beta2=beta2)


def test_three_ranks_that_cannot_share_rows_evenly_are_refused(tmp_path):
    config, _, contents = write_optimizer(tmp_path, "E", 1)
    for rank in range(3):
        write_pt(tmp_path / f"optim_000007_rank{rank}.pt", contents[0])
    with pytest.raises(Refused, match=r"optim_000007_rank\*\.pt: lm_head has 128 rows, which 3 ranks cannot share"):
        read_optimizer(tmp_path, 7, config)


def test_three_ranks_with_chunks_of_unequal_use_are_merged(tmp_path):
    tensors = model("E", rows=192)
    write_model(tmp_path, tensors)
    config = read_model(tmp_path, 7)[0]
    want, adamw, muon = optimizer_state("E", config)
    for rank in range(3):
        write_pt(tmp_path / f"optim_000007_rank{rank}.pt", rank_content("E", want, adamw, muon, rank, 3))
    got = read_optimizer(tmp_path, 7, config)
    assert all(np.array_equal(got.arrays[name], array) for name, array in want.items())


def test_stacked_buffers_in_a_list_of_two_state_dicts_are_read(tmp_path):
    """The form of January 2026: variance reduction in Muon, but not yet one combined optimizer."""
    config, want, (content,) = write_optimizer(tmp_path, "C", 1)
    first = min(number for number, entry in content["state"].items() if "momentum_buffer" in entry)
    parts = [{"state": {}, "param_groups": []}, {"state": {}, "param_groups": []}]
    for number, entry in content["state"].items():
        parts[number >= first]["state"][number - first if number >= first else number] = entry
    for group in content["param_groups"]:
        part = group.pop("kind") == "muon"
        parts[part]["param_groups"].append(group | {"params": [n - first * part for n in group["params"]]})
    write_pt(tmp_path / "optim_000007_rank0.pt", parts)
    got = read_optimizer(tmp_path, 7, config)
    assert all(np.array_equal(got.arrays[name], array) for name, array in want.items())
    assert [group.kind for group in got.groups.values()] == ["adamw"] * 5 + ["muon"]
    write_pt(tmp_path / "optim_000007_rank1.pt", content)
    with pytest.raises(Refused, match="kind must be adamw or muon, got NoneType"):
        read_optimizer(tmp_path, 7, config)


def test_no_optimizer_file_is_no_error_and_the_oldest_name_is_known(tmp_path):
    config, _, _ = write_optimizer(tmp_path, "A", 1)
    (tmp_path / "optim_000007_rank0.pt").rename(tmp_path / "optim_000007.pt")
    arrays = read_optimizer(tmp_path, 7, config).arrays
    assert arrays["count/unembedding"] == arrays["count/embedding"] == 11
    (tmp_path / "optim_000007.pt").unlink()
    assert read_optimizer(tmp_path, 7, config) is None


def test_files_of_ranks_that_are_missing_are_noticed(tmp_path):
    config, _, _ = write_optimizer(tmp_path, "E", 4)
    (tmp_path / "optim_000007_rank3.pt").unlink()
    with pytest.raises(Refused, match="lm_head"):
        read_optimizer(tmp_path, 7, config)
    (tmp_path / "optim_000007_rank1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"optim_000007_rank1\.pt does not exist"):
        read_optimizer(tmp_path, 7, config)
    (tmp_path / "optim_000007_rank2.pt").unlink()
    with pytest.raises(Refused, match=r"rank0\.pt: exp_avg of lm_head has 1 x 32 of its 128 rows: copy the files"):
        read_optimizer(tmp_path, 7, config)


def _damage(content, *path, value):
    """Set (or with None delete) content[path[0]][path[1]]..."""
    for part in path[:-1]:
        content = content[part]
    if value is None:
        del content[path[-1]]
    else:
        content[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("state", 0, "exp_avg"), None, "rank 0 has no exp_avg of lm_head"),
        (("state", 0), None, "rank 0 has no exp_avg of lm_head"),
        (("state", 1, "exp_avg"), np.ones((128, 16), "f4"), r"exp_avg of wte .*shape \(128, 32\), got \(128, 16\)"),
        (("state", 1, "exp_avg"), np.ones((128, 32)), "exp_avg of wte .* must be float32.*got float64"),
        (("state", 1, "exp_avg"), 3, "exp_avg of wte .* must be a tensor, got int"),
        (("state", 1, "step"), 2.5, r"step of wte \(state 1\) must be a whole number, got 2.5"),
        (("state", 1, "step"), True, "step of wte"),
        (("state", 1, "step"), 1 << 40, "step of wte"),
        (("state", 2, "step"), 12, "group value_embedding must have taken equally many steps, got .*: 12, .*: 11"),
        (("state", 1, "step"), np.array(-3, "i4"), "step of wte .*got -3"),
        (("state", 1, "max_exp_avg_sq"), np.ones(3, "f4"), "the state of wte has an unknown max_exp_avg_sq"),
        (("state", 99), {"step": 1}, "state 99 belongs to no group"),
        (("state", 12), {"momentum_buffer": np.ones((6, 16, 32), "f4")}, "belongs to parameter 11, got some at 12"),
        (("param_groups", 0, "lr"), None, "parameter 0 must have a finite number lr, got NoneType"),
        (("param_groups", 0, "eps"), float("nan"), "finite number eps, got nan"),
        (("param_groups", 0, "betas"), (0.9,), "must have two betas"),
        (("param_groups", 0, "betas"), (0.9, "x"), "finite number betas, got str"),
        (("param_groups", 0, "kind"), "sgd", "kind must be adamw or muon"),
        (("param_groups", 0, "params"), [0, 1], "different integers"),
        (("param_groups", 0, "params"), [], "must have a list params"),
        (("param_groups", 0), None, "this model has 6 AdamW groups|belongs to no group"),
        (("param_groups", 8, "momentum"), 0.5, "all Muon groups must have the same momentum, got 0.5, 0.95"),
        (("param_groups", 8, "weight_decay"), 0.0, "all Muon groups must have the same weight_decay"),
        (("param_groups", 8, "beta2"), None, "all Muon groups must have the same beta2, got 0.9, None"),
        (("param_groups",), None, "state dicts with state and param_groups"),
    ],
)
def test_an_optimizer_file_that_does_not_fit_is_refused_with_the_key(tmp_path, path, value, match):
    config, _, contents = write_optimizer(tmp_path, "E", 1)
    _damage(contents[0], *path, value=value)
    write_pt(tmp_path / "optim_000007_rank0.pt", contents[0])
    with pytest.raises(Refused, match=rf"optim_000007_rank0\.pt: .*({match})"):
        read_optimizer(tmp_path, 7, config)


def test_muon_buffers_of_a_wrong_form_are_refused(tmp_path):
    config, _, contents = write_optimizer(tmp_path, "E", 1)
    first = next(number for number, entry in contents[0]["state"].items() if "momentum_buffer" in entry)
    entry, file = contents[0]["state"][first], tmp_path / "optim_000007_rank0.pt"
    good = dict(entry)

    def refused(match, **change):
        contents[0]["state"][first] = {key: value for key, value in (good | change).items() if value is not None}
        write_pt(file, contents[0])
        with pytest.raises(Refused, match=match):
            read_optimizer(tmp_path, 7, config)

    refused("has an unknown other", other=1)
    refused("no momentum buffers", momentum_buffer=None)
    refused("must hold 2 to 2 matrices, got None", second_momentum_buffer=None)
    refused("must hold 2 to 2 matrices, got 1", momentum_buffer=good["momentum_buffer"][:1])
    refused("has 2 members, the model 0 of shape", momentum_buffer=np.ones((2, 5, 5), "f4"))
    refused(r"must have shape \(2, 1, 12\)", second_momentum_buffer=np.ones((2, 2, 1), "f4"))
    refused("must be finite", momentum_buffer=good["momentum_buffer"] * np.float32("inf"))
    del contents[0]["state"][first]
    write_pt(file, contents[0])
    with pytest.raises(Refused, match="no momentum buffers"):
        read_optimizer(tmp_path, 7, config)


def test_ranks_of_different_runs_or_steps_are_refused(tmp_path):
    config, _, contents = write_optimizer(tmp_path, "E", 2)
    contents[1]["state"][0]["step"] = 12
    write_pt(tmp_path / "optim_000007_rank1.pt", contents[1])
    with pytest.raises(Refused, match=r"different steps of lm_head: \[11, 12\]"):
        read_optimizer(tmp_path, 7, config)
    contents[1]["param_groups"][0]["lr"] = 0.5
    write_pt(tmp_path / "optim_000007_rank1.pt", contents[1])
    with pytest.raises(Refused, match="not from one run and step"):
        read_optimizer(tmp_path, 7, config)


def test_a_missing_rank_of_2025_is_noticed(tmp_path):
    config, _, _ = write_optimizer(tmp_path, "A", 2)
    (tmp_path / "optim_000007_rank1.pt").unlink()
    with pytest.raises(Refused, match="copy the files of all ranks"):
        read_optimizer(tmp_path, 7, config)
