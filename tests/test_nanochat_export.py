"""What we export is what nanochat writes itself: plain files that torch would load, equal to the model behind them."""

import collections
import json
import pickle
import pickletools
import shutil
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from nanochat_jax import nanochat_export
from nanochat_jax.checkpoints import find, store
from nanochat_jax.distributed import sharding
from nanochat_jax.files import torch_write
from nanochat_jax.files.tiktoken_read import read_tokenizer_pickle
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.files.torch_write import Tensor, write_pt
from nanochat_jax.interop.nanochat_model import read_model
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.nanochat_write import EMBEDDING_TYPES, model_config, optimizer_content
from nanochat_jax.interop.optimizer_state import groups_to_json, nanochat_groups, recorded_groups
from nanochat_jax.model.gpt import GPTConfig, window_sizes
from nanochat_jax.nanochat_export import ExportConfig, export
from nanochat_jax.optim import groups as optim
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.interop.test_nanochat_model import model as nanochats_model
from tests.interop.test_nanochat_model import write_model
from tests.interop.test_nanochat_optimizer import optimizer_state as random_state
from tests.interop.test_nanochat_optimizer import rank_content, write_optimizer
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.models import tiny_config
from tests.test_nanochat_import import assert_equal, contents

# torch/_weights_only_unpickler.py: the names that plain tensors need, and the operations it knows (of protocol 2)
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch BFloat16Storage"}
OPERATIONS = {
    *("PROTO", "STOP", "GLOBAL", "REDUCE", "MARK", "TUPLE", "EMPTY_TUPLE", "EMPTY_LIST", "APPENDS", "EMPTY_DICT"),
    *("SETITEMS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "LONG1", "BINFLOAT", "BINUNICODE", "BINPERSID"),
}
RATES = {"embedding_lr": 1.0, "unembedding_lr": 1.0, "matrix_lr": 1.0}


def found_in(base, source="base"):
    return find.find_model(source, base=base)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """That model for nanochat, with bfloat16 embeddings under bf16/."""
    out = tmp_path_factory.mktemp("theirs")
    for name, kind in (("f32", "float32"), ("bf16", "bfloat16")):
        folder = out / name / "base_checkpoints" / "d2"
        export(found_in(base), tiny.tokenizer(), folder, EMBEDDING_TYPES[kind], log=lambda line: None)
    return out


def run(monkeypatch, base, *argv) -> int | str:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return run_command(nanochat_export.main, ExportConfig, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# The same model


def test_a_model_of_ours_and_its_optimizer_come_back_bit_for_bit(base, exported):
    found, again = found_in(base), found_in(exported / "f32")
    assert (found.ours, again.ours, again.tag, again.step) == (True, False, "d2", 7)
    (config_1, params_1, _), (config_2, params_2, _) = find.load_params(found), find.load_params(again)
    assert config_1 == config_2
    assert_equal(sharding.flatten_by_path(params_1), sharding.flatten_by_path(params_2))
    empty = optim.default_groups(config_1.n_embd, **RATES)
    (groups_1, arrays_1), (groups_2, arrays_2) = (find.load_optimizer(f, config_1, empty) for f in (found, again))
    assert groups_1 == groups_2
    arrays_1.pop("bad_steps")
    assert_equal(arrays_1, arrays_2)


def test_each_group_has_the_settings_that_nanochat_reads_and_our_rates(exported):
    groups = read_pt(exported / "f32/base_checkpoints/d2/optim_000007_rank0.pt")["param_groups"]
    ours = optim.default_groups(64, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
    adamw = {"kind", "lr", "betas", "eps", "weight_decay", "initial_lr", "params"}
    muon = {"kind", "lr", "momentum", "ns_steps", "beta2", "weight_decay", "initial_lr", "params"}
    assert [group.keys() for group in groups] == [adamw] * 6 + [muon] * 4
    for group, (name, want) in zip(groups, list(ours.items())[:6]):
        got = (group["initial_lr"], *group["betas"], group["eps"], group["weight_decay"])
        assert got == (want.lr, want.b1, want.b2, want.eps, want.weight_decay), name
    assert {(g["initial_lr"], g["momentum"], g["ns_steps"], g["beta2"]) for g in groups[6:]} == {(0.02, 0.95, 5, 0.9)}
    assert [n for group in groups for n in group["params"]] == list(range(8 + 13))  # 13 matrices: one gate


def test_bfloat16_is_for_embeddings_and_their_moments_only(base, exported):
    folder = exported / "bf16/base_checkpoints/d2"
    exact = read_pt(exported / "f32/base_checkpoints/d2/model_000007.pt")
    model = read_pt(folder / "model_000007.pt")
    assert type(model) is collections.OrderedDict  # as a state dict is
    rounded = {"transformer.wte.weight", "value_embeds.1.weight"}
    assert {name for name, tensor in model.items() if tensor.dtype == ml_dtypes.bfloat16} == rounded
    for name, tensor in model.items():
        want = exact[name].astype(ml_dtypes.bfloat16) if name in rounded else exact[name]
        assert tensor.tobytes() == want.tobytes(), name
    state = read_pt(folder / "optim_000007_rank0.pt")["state"]
    types = {n: entry["exp_avg"].dtype.name for n, entry in state.items() if "exp_avg" in entry}
    assert [types[n] for n in range(4)] == ["float32", "bfloat16", "bfloat16", "float32"]  # head, wte, values, resid
    read_optimizer(folder, 7, read_model(folder, 7)[0])


def test_nanochats_own_files_of_several_ranks_become_files_of_one(tmp_path):
    source, folder = tmp_path / "theirs/base_checkpoints/d3", tmp_path / "out/base_checkpoints/d3"
    source.mkdir(parents=True)
    _, want, _ = write_optimizer(source, "E", 8)
    meta = json.loads((source / "meta_000007.json").read_text())
    tokenizer = tokenizer_of(meta["model_config"]["vocab_size"])
    found = find.find_model("base", base=tmp_path / "theirs")
    before = contents(source)
    export(found, tokenizer, folder, EMBEDDING_TYPES["float32"], log=lambda line: None)
    assert contents(source) == before
    again = read_optimizer(folder, 7, read_model(folder, 7)[0])
    assert again.groups == read_optimizer(source, 7, read_model(source, 7)[0]).groups
    assert sorted(p.name for p in folder.iterdir()) == ["meta_000007.json", "model_000007.pt", "optim_000007_rank0.pt"]
    assert_equal(again.arrays, want)
    assert json.loads((folder / "meta_000007.json").read_text()) == meta


@pytest.mark.parametrize("ranks", [2, 3, 8, 16])
def test_the_optimizers_state_is_cut_over_ranks_as_nanochat_cuts_it(tmp_path, ranks):
    write_model(tmp_path, nanochats_model("E", rows=192 if ranks == 3 else 128), step=7)
    model = read_model(tmp_path, 7)[0]
    whole, adamw, muon = random_state("E", model)
    write_pt(tmp_path / "optim_000007_rank0.pt", rank_content("E", whole, adamw, muon, 0, 1))
    state = read_optimizer(tmp_path, 7, model)
    nanochats = [rank_content("E", whole, adamw, muon, rank, ranks) for rank in range(ranks)]
    for rank, want in enumerate(nanochats):
        write_pt(
            path := tmp_path / f"{rank}.pt", optimizer_content(state, model, EMBEDDING_TYPES["float32"], rank, ranks)
        )
        got = read_pt(path)
        assert [group["params"] for group in got["param_groups"]] == [group["params"] for group in want["param_groups"]]
        assert got["state"].keys() == want["state"].keys()
        for number, entry in want["state"].items():
            assert got["state"][number].keys() == entry.keys()
            for key, array in entry.items():
                padding = array == 9  # what lies there says nothing
                assert np.array_equal(np.where(padding, 9, got["state"][number][key]), array)


def test_an_export_for_several_ranks_comes_back_bit_for_bit(base, tmp_path, monkeypatch):
    assert run(monkeypatch, base, "--output", tmp_path, "--ranks", "8") == 0
    folder = tmp_path / "base_checkpoints/d2"
    assert {p.name for p in folder.glob("optim*")} == {f"optim_000007_rank{rank}.pt" for rank in range(8)}
    found = found_in(base)
    model, _, meta = find.load_params(found)
    state = nanochat_export.load_optimizer_state(found, model, meta)
    again = read_optimizer(folder, 7, model)
    assert again.groups == state.groups
    state.arrays.pop("bad_steps")
    assert_equal(again.arrays, state.arrays)


def tokenizer_of(size: int) -> Tokenizer:
    """`size` tokens, for a model that has so few that they cannot hold the 256 bytes."""
    tokenizer = tiny.tokenizer()
    tokenizer.vocab_size = size
    return tokenizer


def test_meta_has_what_nanochats_scripts_look_for(base, exported):
    meta = json.loads((exported / "f32/base_checkpoints/d2/meta_000007.json").read_text())
    sizes = {"sequence_len": 64, "vocab_size": 265, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
    assert meta["model_config"] == sizes | {"window_pattern": "S"}
    assert meta["step"] == 7 and meta["user_config"] == tiny.SETTINGS
    assert [meta[name] for name in ("max_seq_len", "device_batch_size", "total_batch_size")] == [64, 1, 512]
    assert not meta.keys() & {"optimizer_groups", "tokenizer", "converted_from"}


def test_the_tokenizer_is_nanochats_pickle_of_tiktoken_and_its_table_of_lengths(exported):
    folder, ours = exported / "f32" / "tokenizer", tiny.tokenizer()
    tables = read_tokenizer_pickle(folder / "tokenizer.pkl")
    assert tables["mergeable_ranks"] == ours.mergeable_ranks and tables["special_tokens"] == ours.special_tokens
    encoding = pickle.loads((folder / "tokenizer.pkl").read_bytes())
    assert encoding.encode_ordinary("größer, 3+4") == ours.encode("größer, 3+4")
    assert encoding.encode_single_token("<|bos|>") == ours.bos and encoding.n_vocab == 265
    lengths = read_pt(folder / "token_bytes.pt")
    assert lengths.dtype == np.int32 and lengths.tolist() == [1] * 256 + [0] * 9
    assert Tokenizer.load(folder).digest() == ours.digest()


# ---------------------------------------------------------------------------------------------------------------------
# Files as torch has them


def test_pickles_name_and_do_only_what_torch_allows_with_weights_only(exported):
    for file in exported.glob("*/base_checkpoints/d2/*.pt"):
        with zipfile.ZipFile(file) as z:
            operations = list(pickletools.genops(z.read(f"{file.stem}/data.pkl")))
        assert {opcode.name for opcode, *_ in operations} <= OPERATIONS
        assert {arg for opcode, arg, _ in operations if opcode.name == "GLOBAL"} <= NAMES
        assert operations[0][1] == 2


@pytest.mark.parametrize("zip64_from", [torch_write.ZIP64_FROM, 1])
def test_records_are_stored_named_and_aligned_as_torch_has_them(tmp_path, monkeypatch, zip64_from):
    monkeypatch.setattr(torch_write, "ZIP64_FROM", zip64_from)
    data = {"a": np.arange(5, dtype=np.float32), "b": np.array(2.5, ml_dtypes.bfloat16), "c": {"d": np.ones((2, 3))}}
    path = tmp_path / "model_000007.pt"
    write_pt(path, data)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
        names = [info.filename.removeprefix("model_000007/") for info in z.infolist()]
        assert names == ["data.pkl", "byteorder", "data/0", "data/1", "data/2", "version"]
        assert z.read("model_000007/version") == b"3\n" and z.read("model_000007/byteorder") == b"little"
        for info in z.infolist():
            name, extra = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
            begin = info.header_offset + 30 + name + extra
            assert info.compress_type == zipfile.ZIP_STORED and begin % 64 == 0
            assert raw[begin : begin + info.file_size] == z.read(info)
    got = read_pt(path)
    assert got["a"].tolist() == [0, 1, 2, 3, 4] and got["b"].shape == () and float(got["b"]) == 2.5
    assert got["c"]["d"].dtype == np.float64 and got["c"]["d"].shape == (2, 3)


def test_a_tensor_is_written_piece_by_piece(tmp_path):
    """32 MiB of float32 in 16 pieces, made when they are asked for, never need the memory of more than a few."""

    class Pieces:
        def __len__(self):
            return 16

        def __getitem__(self, i):
            if i >= 16:
                raise IndexError
            return np.full((1 << 19,), i, np.float32)

    tracemalloc.start()
    write_pt(tmp_path / "big.pt", {"x": Tensor((16, 1 << 19), np.dtype(ml_dtypes.bfloat16), Pieces())})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    got = read_pt(tmp_path / "big.pt")["x"]
    assert got.shape == (16, 1 << 19) and all(np.all(got[i] == i) for i in range(16))


def test_what_is_not_plain_data_is_refused(tmp_path):
    for value in (b"bytes", {1, 2}, np.float32(1), 1j, object()):
        with pytest.raises(TypeError, match=type(value).__name__):
            write_pt(tmp_path / "x.pt", {"x": value})
    assert not (tmp_path / "x.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What nanochat cannot build


@pytest.mark.parametrize("sequence_len", [64, 128, 256, 2048])
@pytest.mark.parametrize("pattern", ["L", "S", "SSSL", "SL", "LLS", "SLLSSL"])
@pytest.mark.parametrize("n_layer", [1, 2, 5, 12])
def test_a_window_pattern_is_found_that_gives_the_models_windows(pattern, n_layer, sequence_len):
    windows = window_sizes(pattern, n_layer, sequence_len)
    model = tiny_config(n_layer=n_layer, sequence_len=sequence_len, windows=windows)
    for recorded in (None, pattern, "LS", "x", "", 7):
        found = model_config(model, recorded)["window_pattern"]
        assert window_sizes(found, n_layer, sequence_len) == windows
    assert model_config(model, pattern)["window_pattern"] == pattern


@pytest.mark.parametrize(
    "change",
    [
        {"rope_base": 10_000.0},
        {"qk_scale": 1.15},
        {"logit_cap": 20.0},
        {"residual_lambdas": False},
        {"value_embed_scale": 2.0},
        {"value_gate_channels": 32},
        {"smear": False},
        {"backout": False},
        {"padded_vocab": 192},
        {"windows": (7, -1, 64)},
        {"windows": (64, 64, 128)},
    ],
)
def test_a_network_that_todays_nanochat_cannot_build_is_refused_by_its_values(change):
    model = tiny_config(**({"windows": (64, 128, 64)} | change))
    ((name, value),) = change.items()
    with pytest.raises(ValueError) as error:
        model_config(model)
    assert str(error.value).endswith(f"in this one it has no place for {name}={value}")


def test_an_older_network_of_ours_is_refused_before_anything_is_read_or_written(tmp_path, monkeypatch):
    tiny.write_base(tmp_path / "ours", config=GPTConfig(**(vars(tiny.CONFIG) | {"rope_base": 10_000.0})))
    monkeypatch.setattr(store, "read_arrays", None)
    message = run(monkeypatch, tmp_path / "ours", "--output", tmp_path / "out")
    assert message.startswith("error: only networks as nanochat builds them") and "rope_base=10000.0" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command, and the files that are there already


@pytest.fixture
def folder(base, tmp_path):
    """A copy of the base directory."""
    shutil.copytree(base, tmp_path / "ours")
    return tmp_path / "ours"


def test_every_source_goes_where_nanochat_looks_for_it(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for source in ("mid", "sft", "rl"):
        shutil.copytree(folder / "base_checkpoints/d2", folder / store.SOURCES[source] / "my-run")
    for source in ("base", "mid", "sft", "rl"):
        assert run(monkeypatch, folder, "--output", out, "--source", source) == 0
    assert run(monkeypatch, folder, "--output", out, "--no-optimizer", "--output-tag", "d2_small") == 0
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    files = ["meta_000007.json", "model_000007.pt", "optim_000007_rank0.pt"]
    want = {f"{name}/d2/{file}" for name in store.SOURCES.values() for file in files}
    want |= {f"base_checkpoints/d2_small/{file}" for file in files[:2]}
    assert made == want | {"tokenizer/tokenizer.pkl", "tokenizer/token_bytes.pt"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_files_that_are_there_are_never_replaced(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(monkeypatch, folder, "--output", out) == 0
    before = contents(out)
    assert "_000007" in (message := run(monkeypatch, folder, "--output", out)) and "is there already" in message
    for left in ("optim_000007_rank1.pt", "meta_000007.json"):
        tag = out / "base_checkpoints" / left[:5]
        tag.mkdir()
        (tag / left).write_text("mine")
        assert f"{left} is there already" in run(monkeypatch, folder, "--output", out, "--output-tag", left[:5])
        shutil.rmtree(tag)
    assert "checkpoints of our own" in run(monkeypatch, folder, "--output", folder)
    assert contents(out) == before


def test_another_tokenizer_in_the_output_is_refused_and_kept(folder, tmp_path, monkeypatch):
    ranks = {bytes([255 - i]): i for i in range(256)}
    other = Tokenizer("other", r"\w+|\W", ranks, {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})
    other.save_for_nanochat(tmp_path / "out/tokenizer")
    before = contents(tmp_path / "out")
    assert "holds another tokenizer" in run(monkeypatch, folder, "--output", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    other.save(folder / "tokenizer")
    assert "is not the one that the model was trained" in run(monkeypatch, folder, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_model_appears_last_so_that_half_an_export_is_no_checkpoint(base, tmp_path):
    made = []
    export(found_in(base), tiny.tokenizer(), tmp_path / "base_checkpoints/d2", np.dtype("f4"), log=made.append)
    assert made[-1] == str(tmp_path / "base_checkpoints/d2/model_000007.pt") and len(made) == 5


def test_a_failure_leaves_no_file_behind(folder, tmp_path, monkeypatch):
    out, write = tmp_path / "out", torch_write.write_archive

    def fails_late(path, pickled):
        write(path, pickled)
        if path.name.startswith("optim"):
            raise OSError("No space left on device")

    monkeypatch.setattr(torch_write, "write_archive", fails_late)
    assert run(monkeypatch, folder, "--output", out) == "error: No space left on device"
    assert contents(out) == {}
    assert run(monkeypatch, folder, "--output", out, "--no-optimizer") == 0


def test_a_model_without_optimizer_state_says_so(tmp_path, monkeypatch, capsys):
    tiny.write_nanochat_base(tmp_path / "theirs")
    assert run(monkeypatch, tmp_path / "theirs", "--output", tmp_path / "out") == 0
    assert "has no optimizer state, so none is written" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("optim*"))


def test_bad_flags_end_in_one_sentence_and_write_nothing(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    file = tmp_path / "file"
    file.write_text("mine")
    for argv, match in (
        (["--dtype", "float16"], "--dtype must be float32 or bfloat16"),
        (
            ["--ranks", "7"],
            "--ranks=7: lm_head has 320 rows, which 7 ranks cannot share evenly; choose a divisor of 320",
        ),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--ranks", "8", "--no-optimizer"], "--ranks=8 is about the optimizer's state"),
        (["--source", "middle"], "must be base, mid, sft or rl"),
        (["--source", "sft"], "no sft model"),
        (["--model-step", "8"], "--model-step=8 is not in"),
        (["--output-tag", "../d2"], "--output-tag must be the name of one folder"),
        (["--output-tag", "a/b"], "--output-tag must be the name of one folder"),
        (["--output", file], f"{file} must be a folder that can be written to"),
    ):
        message = run(monkeypatch, folder, "--output", out, *argv)
        assert message.startswith("error: ") and match in message and "\n" not in message
    assert not out.exists() and file.read_text() == "mine"


def test_a_converted_model_gives_back_what_it_was_converted_from(tmp_path):
    """Group values, too, which no checkpoint of ours has."""
    source = tmp_path / "theirs/base_checkpoints/d3"
    source.mkdir(parents=True)
    model, _, _ = write_optimizer(source, "E", 1)
    state = read_optimizer(source, 7, model)
    meta = {"optimizer_groups": {}, "nanochat_groups": json.loads(json.dumps(groups_to_json(state.groups)))}
    target = tmp_path / "ours/base_checkpoints/d3/7"
    _, params, _ = read_model(source, 7)
    store.write(target, sharding.flatten_by_path(params), state.arrays, meta)
    got = nanochat_export.load_optimizer_state(find.Found(target.parent, 7, True), model, meta)
    content = optimizer_content(got, model, EMBEDDING_TYPES["float32"])
    write_pt(tmp_path / "optim_000007_rank0.pt", content)
    again = read_optimizer(tmp_path, 7, model)
    assert again.groups == state.groups
    assert_equal(again.arrays, state.arrays)


def test_group_values_are_told_in_both_ways_and_missing_rates_refused():
    adamw = {"lr": 0.5, "b1": 0.8, "b2": 0.9, "eps": 1e-9, "weight_decay": 0.1}
    recorded = {"embedding": adamw, "matrix": {"lr": 0.25, "b2": 0.7, "weight_decay": 0.2}}
    assert recorded_groups(nanochat_groups(recorded)) == recorded
    del adamw["lr"]
    with pytest.raises(ValueError, match="no rate of group embedding: convert the model again, or --no-optimizer"):
        nanochat_groups(recorded)
