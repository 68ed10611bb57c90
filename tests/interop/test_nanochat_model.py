"""nanochat's checkpoints of every era, on tiny made-up models: what is read, and what is refused, by name."""

import json

import ml_dtypes
import numpy as np
import pytest

from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.interop.nanochat_model import (
    NAMES,
    era_config,
    find_era,
    find_steps,
    nanochat_name,
    our_path,
    read_model,
    tensor_shapes,
)
from tests.support.torch_files import write_pt

SIZES = {"sequence_len": 1000, "vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
PATTERN = {"window_pattern": "SSL"}


def names_and_shapes(era: str, rows: int = 128) -> dict[str, tuple]:
    """Written out by hand, as the files have them: layers 0 and 2 have a value embedding."""
    shapes = {"transformer.wte.weight": (rows, 32), "lm_head.weight": (rows, 32)}
    for i in range(3):
        attn, mlp = f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp"
        shapes |= {f"{attn}.c_q.weight": (32, 32), f"{attn}.c_k.weight": (16, 32), f"{attn}.c_v.weight": (16, 32)}
        shapes |= {f"{attn}.c_proj.weight": (32, 32)}
        shapes |= {f"{mlp}.c_fc.weight": (128, 32), f"{mlp}.c_proj.weight": (32, 128)}
        if era in "CDE" and i != 1:
            shapes |= {f"{attn}.ve_gate.weight": (2, 32 if era == "C" else 12), f"value_embeds.{i}.weight": (rows, 16)}
    if era != "A":
        shapes |= {"resid_lambdas": (3,), "x0_lambdas": (3,)}
    if era == "E":
        shapes |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}
    return shapes


def model(era: str, rows: int = 128) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype("f4") for name, shape in names_and_shapes(era, rows).items()}


def write_model(folder, tensors, meta=None, step=7):
    write_pt(folder / f"model_{step:06d}.pt", tensors)
    meta = {"step": step, "model_config": SIZES | PATTERN} if meta is None else meta
    (folder / f"meta_{step:06d}.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return folder


def leaf(params, path):
    for part in path:
        params = params[part]
    return params


# ---------------------------------------------------------------------------------------------------------------------
# Names and eras


def test_names_and_paths_are_one_table_read_both_ways():
    assert our_path("transformer.h.12.attn.c_q.weight") == ("blocks", 12, "attn", "c_q")
    assert our_path("value_embeds.3.weight") == ("blocks", 3, "attn", "value_embed")
    assert our_path("x0_lambdas") == ("x0_lambdas",)
    assert nanochat_name(("blocks", 0, "mlp", "c_proj")) == "transformer.h.0.mlp.c_proj.weight"
    assert nanochat_name("blocks/10/attn/ve_gate") == "transformer.h.10.attn.ve_gate.weight"
    for pattern in NAMES:
        for layer in (0, 7, 31):
            name = pattern.replace("*", str(layer))
            assert nanochat_name(our_path(name)) == name
    for bad in ("transformer.h.*.attn.c_q.weight", "transformer.h.01.attn.c_q.weight", "wte", "", "h.1.2"):
        with pytest.raises(KeyError):
            our_path(bad)


FIELDS = ("windows", "rope_base", "qk_scale", "residual_lambdas", "value_embed_scale", "value_gate_channels")
FIELDS += ("smear", "backout")
ERAS = {  # windows for sequence_len 1000 and the pattern SSL of three layers
    "A": ((-1, -1, -1), 1e4, 1.0, False, 0.0, 12, False, False),
    "B": ((500, 500, 1000), 1e4, 1.0, True, 0.0, 12, False, False),
    "C": ((500, 500, 1000), 1e4, 1.0, True, 2.0, 32, False, False),
    "D": ((384, 384, 1000), 1e5, 1.15, True, 3.0, 12, False, False),
    "E": ((256, 256, 1000), 1e5, 1.2, True, 3.0, 12, True, True),
}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("rows", [100, 128])
@pytest.mark.parametrize("era", ERAS)
def test_every_era_is_recognised_and_read_exactly(tmp_path, era, rows, prefix):
    tensors = model(era, rows)
    assert find_era(tensors) == era
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].astype(ml_dtypes.bfloat16)
    write_model(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()})
    config, params, meta = read_model(tmp_path, 7)
    for field, value in (dict(zip(FIELDS, ERAS[era])) | SIZES | {"padded_vocab": rows, "logit_cap": 15.0}).items():
        assert getattr(config, field) == value, f"{field} of era {era}"
    assert meta["step"] == 7
    assert {nanochat_name(path) for path in tensor_shapes(config)} == tensors.keys()
    for name, tensor in tensors.items():
        got = leaf(params, our_path(name))
        assert got.dtype == np.float32 and got.flags.writeable and np.array_equal(got, tensor.astype("f4")), name


def test_a_pattern_is_repeated_over_the_layers_and_the_last_layer_is_long():
    def windows(pattern, n_layer, era="E"):
        return era_config(era, SIZES | {"window_pattern": pattern, "n_layer": n_layer}, model("E")).windows

    assert windows("SSSL", 6) == (256, 256, 256, 1000, 256, 1000)
    assert windows("sl", 5) == (256, 1000, 256, 1000, 1000)
    assert windows("S", 1) == (1000,)
    assert windows("SSSSSSLL", 3) == (256, 256, 1000)


@pytest.mark.parametrize(
    ("sequence_len", "C", "D", "E"), [(256, 128, 128, 128), (2048, 1024, 768, 512), (513, 256, 256, 256)]
)
def test_short_windows_follow_the_rule_of_their_era(sequence_len, C, D, E):
    for era, short in (("B", C), ("C", C), ("D", D), ("E", E)):
        got = era_config(era, SIZES | PATTERN | {"sequence_len": sequence_len}, model("E"))
        assert got.windows == (short, short, sequence_len), era


def test_without_a_window_pattern_early_eras_see_everything_and_later_ones_are_refused(tmp_path):
    assert era_config("A", SIZES, model("A")).windows == (-1, -1, -1)
    assert era_config("B", SIZES, model("B")).windows == (1000, 1000, 1000)
    for era in "CDE":
        with pytest.raises(Refused, match="window_pattern must be letters S and L, got null"):
            era_config(era, SIZES, model(era))


def test_the_logit_cap_of_early_march_is_passed_on(tmp_path):
    write_model(tmp_path, model("C"))
    assert read_model(tmp_path, 7, logit_cap=20.0)[0].logit_cap == 20.0


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refuses(folder, match, step=7):
    with pytest.raises((Refused, FileNotFoundError), match=match) as refusal:
        read_model(folder, step)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lm_head.weight": None}, "needs lm_head.weight"),
        ({"transformer.wte.weight": None}, r"needs transformer\.wte\.weight with 2 axes, got None"),
        ({"transformer.wte.weight": np.ones(5, "f4")}, r"transformer\.wte\.weight with 2 axes, got \(5,\)"),
        ({"transformer.h.1.mlp.c_fc.weight": None}, r"3 layers needs transformer\.h\.1\.mlp\.c_fc\.weight"),
        ({"transformer.h.3.mlp.c_fc.weight": np.ones((128, 32), "f4")}, r"has no transformer\.h\.3\.mlp\.c_fc\.weight"),
        ({"v0_lambdas": np.ones(3, "f4")}, "has no v0_lambdas"),
        ({"value_embeds.1.weight": np.ones((128, 16), "f4")}, r"has no value_embeds\.1\.weight"),
        ({"x0_lambdas": np.ones(4, "f4")}, r"x0_lambdas must have shape \(3,\), got \(4,\)"),
        ({"lm_head.weight": np.ones((100, 32), "f4")}, r"lm_head\.weight must have shape \(128, 32\), got \(100, 32\)"),
        ({"smear_lambda": np.ones(1)}, "smear_lambda must be float32, bfloat16 or float16, got float64"),
        ({"smear_lambda": np.ones(1, "i4")}, "smear_lambda must be float32, bfloat16 or float16, got int32"),
        ({"smear_lambda": np.array([np.nan], "f4")}, "smear_lambda must be finite, but 1 of its numbers"),
        ({"resid_lambdas": np.array([1, np.inf, -np.inf], "f4")}, "resid_lambdas must be finite, but 2"),
        ({"resid_lambdas": 3.0}, "resid_lambdas must be a tensor, got float"),
        ({"_orig_mod.resid_lambdas": np.ones(3, "f4")}, "a tensor twice"),
        ({3: np.ones(3, "f4")}, "tensors by name"),
    ],
)
def test_a_model_file_that_does_not_fit_is_refused_with_the_tensors_name(tmp_path, change, match):
    tensors = {name: tensor for name, tensor in (model("E") | change).items() if tensor is not None}
    refuses(write_model(tmp_path, tensors), rf"model_000007\.pt.*{match}" if "wte" not in match else match)


def test_gates_of_another_width_belong_to_no_era(tmp_path):
    tensors = model("D") | {"transformer.h.2.attn.ve_gate.weight": np.ones((2, 16), "f4")}
    refuses(write_model(tmp_path, tensors), r"ve_gate\.weight must have shape \(2, 12\), got \(2, 16\)")
    tensors["transformer.h.0.attn.ve_gate.weight"] = np.ones((2, 16), "f4")
    refuses(write_model(tmp_path, tensors), r"h\.0\.attn\.ve_gate\.weight must have 12 or 32 columns, got 16")


def test_a_model_file_of_something_else_is_refused(tmp_path):
    refuses(write_model(tmp_path, [1, 2]), "tensors by name, got list")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_embd": None}, "has no n_embd"),
        ({"n_layer": True}, "n_layer must be an integer from 1 to 1,024, got true"),
        ({"n_layer": "3"}, 'n_layer must be an integer from 1 to 1,024, got "3"'),
        ({"n_layer": 3.0}, "n_layer must be an integer from 1 to 1,024, got 3.0"),
        ({"n_layer": 0}, "n_layer must be an integer from 1 to 1,024, got 0"),
        ({"n_layer": 10**12}, "n_layer must be an integer from 1 to 1,024, got 1000000000000"),
        ({"n_head": -4}, "n_head must be an integer"),
        ({"sequence_len": [1]}, r"sequence_len must be an integer from 1 to 16,777,216, got \[1\]"),
        ({"n_head": 5}, "n_embd must be an even multiple of n_head, got n_embd 32, n_head 5"),
        ({"n_head": 32}, "n_embd must be an even multiple of n_head, got n_embd 32, n_head 32"),
        ({"n_kv_head": 3}, "n_head must be a multiple of n_kv_head, got n_head 4, n_kv_head 3"),
        ({"n_kv_head": 8}, "n_head must be a multiple of n_kv_head"),
        ({"n_embd": 16}, "n_embd must be at least 24 in era E, got 16"),
        ({"vocab_size": 129}, "vocab_size must be at most the 128 rows of wte, got 129"),
        ({"window_pattern": "SXL"}, 'window_pattern must be letters S and L, got "SXL"'),
        ({"window_pattern": ""}, "window_pattern must be letters S and L"),
        ({"window_pattern": 3}, "window_pattern must be letters S and L, got 3"),
        ({"dropout": 0.1}, "fields this reader does not know: dropout"),
    ],
)
def test_an_absurd_model_config_is_refused_with_the_field(tmp_path, change, match):
    sizes = {key: value for key, value in (SIZES | PATTERN | change).items() if value is not None}
    refuses(write_model(tmp_path, model("E"), {"model_config": sizes}), rf"meta_000007\.json: model_config.*{match}")


@pytest.mark.parametrize("meta", ["", "{", "[]", "{}", '{"model_config": 3}', "[" * 100_000, "\ufffe"])
def test_a_meta_file_that_is_not_one_is_refused(tmp_path, meta):
    refuses(write_model(tmp_path, model("E"), meta), r"meta_000007\.json: it ")


def test_files_that_do_not_exist_are_named(tmp_path):
    write_model(tmp_path, model("A"))
    refuses(tmp_path, r"model_000008\.pt does not exist: pass another --model-step", step=8)
    (tmp_path / "meta_000007.json").unlink()
    refuses(tmp_path, r"meta_000007\.json does not exist")
    (tmp_path / "meta_000007.json").write_bytes(b"\xff\xfe\x00")
    refuses(tmp_path, r"meta_000007\.json: it is not JSON")


def test_steps_are_those_with_both_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="--model-tag"):
        find_steps(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"it has no model_\*\.pt"):
        find_steps(tmp_path)
    (tmp_path / "model_000900.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"meta_000900\.json is missing"):
        find_steps(tmp_path)
    for step in ("000100", "000020", "1000000"):
        (tmp_path / f"model_{step}.pt").touch()
        (tmp_path / f"meta_{step}.json").touch()
    (tmp_path / "model_best.pt").touch()
    assert find_steps(tmp_path) == [20, 100, 1000000]
