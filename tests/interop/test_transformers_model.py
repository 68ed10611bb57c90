"""Models in the form of transformers: the network that config.json describes, and what is refused, by name.

Run: python -m pytest tests/interop/test_transformers_model.py
"""

import dataclasses
import json

import numpy as np
import pytest

from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.interop.nanochat_model import tensor_shapes
from nanochat_jax.interop.transformers_model import config_of, read_model, transformers_config, transformers_name
from nanochat_jax.model.gpt import RMS_EPS
from tests.support.transformers_files import EARLY, FIELDS, KINDS, safetensors, tensors, write_transformers


def test_every_parameter_has_the_name_and_shape_that_the_library_gives_it():
    named = {transformers_name(path): shape for path, shape in tensor_shapes(EARLY).items()}
    assert named == {name: array.shape for name, array in tensors()[0].items()}
    with pytest.raises(KeyError):
        transformers_name("blocks/0/attn/c_other")


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_parameters_become_float32_whatever_they_are_stored_in(tmp_path, kind):
    params = flatten_by_path(write_transformers(tmp_path, kind=kind))
    config, got = read_model(tmp_path)
    assert config == EARLY
    for name, leaf in flatten_by_path(got).items():
        assert leaf.dtype == np.float32 and np.array_equal(leaf, params[name].astype(KINDS[kind]).astype("f4"))


def test_a_config_is_the_same_after_it_was_written_and_read():
    written = transformers_config(EARLY, bos=256, eos=260, dtype="float32")
    assert written == {key: value for key, value in FIELDS.items() if key != "transformers_version"} | {
        "rms_norm_eps": RMS_EPS  # the network's own; the library has another by default
    }
    other = dataclasses.replace(EARLY, rope_base=500_000.0, logit_cap=30.0)
    assert config_of(json.loads(json.dumps(transformers_config(other, bos=0, eos=1, dtype="bfloat16")))) == other


def test_a_network_of_a_later_month_has_our_class():
    later = {"qk_scale": 1.2, "residual_lambdas": True, "smear": True, "value_embed_scale": 2.0, "windows": (16, 64)}
    for field, value in later.items():
        model = dataclasses.replace(EARLY, **{field: value})
        fields = json.loads(json.dumps(transformers_config(model, bos=0, eos=1, dtype="float32")))
        assert fields["architectures"] == ["NanochatJaxForCausalLM"] and config_of(fields) == model


def test_the_form_of_earlier_versions_of_the_library_is_read():
    fields = {key: value for key, value in FIELDS.items() if key not in ("rope_parameters", "dtype")}
    fields |= {"rope_theta": 20_000, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert config_of(fields) == dataclasses.replace(EARLY, rope_base=20_000.0)


def test_rows_beyond_the_tokenizer_are_padding():
    config = config_of(FIELDS | {"vocab_size": 320}, 265)
    assert (config.vocab_size, config.padded_vocab) == (265, 320)
    with pytest.raises(Refused, match="vocab_size must be at least the tokenizer's 266 tokens, got 265"):
        config_of(FIELDS, 266)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, "model_type must be 'nanochat' or 'nanochat_jax', got \"llama\""),
        ({"model_type": None}, "model_type must be 'nanochat'"),
        ({"architectures": ["NanoChatModel"]}, "architectures must be"),
        ({"window_pattern": "SSSL"}, "fields this reader does not know, so the network may be another one: window_pa"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "relu2", got "gelu"'),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06 or 1.19.*, got 1e-05"),
        ({"attention_bias": True}, "attention_bias must be false, got true"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false, got true"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type must be 'default', got \"yarn\""),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "must hold rope_theta and rope_type only"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a number above 0"),
        ({"rope_parameters": 3}, "must hold rope_theta and rope_type only"),
        ({"rope_theta": 1e4}, "must hold rope_theta and rope_type only"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling must be null"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping must be a number above 0"),
        ({"final_logit_softcapping": float("nan")}, "final_logit_softcapping must be a number above 0"),
        ({"final_logit_softcapping": 10**400}, "final_logit_softcapping must be a number above 0"),
        ({"final_logit_softcapping": 100.0}, "logit_cap must be above 0 and at most 60"),
        ({"intermediate_size": 8192}, "intermediate_size must be 4 x hidden_size, 256, got 8192"),
        ({"head_dim": 64}, "head_dim must be hidden_size / num_attention_heads"),
        ({"num_attention_heads": 5}, "n_embd must be an even multiple of n_head"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1 to 1,024, got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1,024"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"vocab_size": 2.0}, "vocab_size must be an integer"),
    ],
)
def test_what_the_network_does_not_have_is_refused_with_the_field(tmp_path, change, match):
    write_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | change))
    with pytest.raises(Refused, match=match) as e:
        read_model(tmp_path)
    assert str(e.value).startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"vocab_size": 1, "vocab_size": 2}', "\ufffe"])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    write_transformers(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Refused, match=r"config\.json: "):
        read_model(tmp_path)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_size_that_is_missing_is_named(field):
    with pytest.raises(Refused, match=field):
        config_of({key: value for key, value in FIELDS.items() if key != field})


def test_tensors_that_are_missing_unknown_misshapen_or_not_numbers_are_refused(tmp_path):
    named, _ = tensors()
    q = "model.layers.1.self_attn.q_proj.weight"
    for change, match in (
        ({q: None}, f"a NanoChatForCausalLM with 2 layers needs {q}"),
        ({"model.layers.0.resid_lambda": named[q]}, "with 2 layers has no model.layers.0.resid_lambda"),
        ({q: named[q][:32]}, rf"{q} must have shape \(64, 64\), got \(32, 64\)"),
        ({q: np.full_like(named[q], np.nan)}, f"{q} must be finite"),
    ):
        write_transformers(tmp_path)
        arrays = {name: array for name, array in (named | change).items() if array is not None}
        (tmp_path / "model.safetensors").write_bytes(safetensors(arrays))
        with pytest.raises(Refused, match=match) as e:
            read_model(tmp_path)
        assert str(e.value).startswith(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(safetensors(named, "F64"))
    with pytest.raises(Refused, match="must be float32, bfloat16 or float16, got float64"):
        read_model(tmp_path)
