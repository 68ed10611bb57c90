"""The form in which the transformers library keeps nanochat's models: config.json and safetensors.

The library's own class, NanoChatForCausalLM, computes nanochat's network of era A (October 2025 to January 2026) and no
other. All other networks have the class NanochatJaxForCausalLM, whose code lies beside the tensors; its config.json has
a field for everything that determines the network, and the padding rows are kept.

The matrices are those of nanochat's own files under other names: (out, in), nothing is transposed or permuted. The
library's norms add 1e-6 by default, where nanochat's add 1.2e-7, which moves a logit by less than 1e-4.
"""

import math
from pathlib import Path

import numpy as np

from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files.json_read import read_json_object
from nanochat_jax.files.plain_pickle import Refused, naming_file
from nanochat_jax.files.safetensors_read import read_shards
from nanochat_jax.files.torch_write import Tensor
from nanochat_jax.interop.nanochat_model import ERAS, LIMITS, listed, read_params, shown, split_layer
from nanochat_jax.model.gpt import RMS_EPS, GPTConfig

CONFIG = "config.json"
LARGEST_NUMBER = 1e12  # that a field may be
MODEL_TYPE, CLASS = "nanochat", "NanoChatForCausalLM"
OUR_TYPE, OUR_CLASS = "nanochat_jax", "NanochatJaxForCausalLM"
OUR_CODE = "modeling_nanochat_jax"  # the module of our class
NAMES = {  # transformers' name of a tensor -> our path; * stands for the layer
    "model.embed_tokens.weight": "wte",
    "lm_head.weight": "lm_head",
    "model.layers.*.self_attn.q_proj.weight": "blocks/*/attn/c_q",
    "model.layers.*.self_attn.k_proj.weight": "blocks/*/attn/c_k",
    "model.layers.*.self_attn.v_proj.weight": "blocks/*/attn/c_v",
    "model.layers.*.self_attn.o_proj.weight": "blocks/*/attn/c_proj",
    "model.layers.*.mlp.fc1.weight": "blocks/*/mlp/c_fc",
    "model.layers.*.mlp.fc2.weight": "blocks/*/mlp/c_proj",
    # of our class only
    "model.layers.*.self_attn.ve_gate.weight": "blocks/*/attn/ve_gate",
    "model.layers.*.self_attn.value_embed.weight": "blocks/*/attn/value_embed",
    "model.resid_lambdas": "resid_lambdas",
    "model.x0_lambdas": "x0_lambdas",
    "model.smear_gate.weight": "smear_gate",
    "model.smear_lambda": "smear_lambda",
    "model.backout_lambda": "backout_lambda",
}
NAMES_OF = {path: name for name, path in NAMES.items()}
SIZES = {  # a field of config.json -> the field of GPTConfig
    "max_position_embeddings": "sequence_len",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
}
OUR_FIELDS = {  # what else the config.json of our class says
    "padded_vocab_size": "padded_vocab",
    "windows": "windows",
    "rope_theta": "rope_base",
    "qk_scale": "qk_scale",
    "final_logit_softcapping": "logit_cap",
    "residual_lambdas": "residual_lambdas",
    "value_embed_scale": "value_embed_scale",
    "value_gate_channels": "value_gate_channels",
    "smear": "smear",
    "backout": "backout",
}
OUR_SETTLED = {
    "model_type": OUR_TYPE,
    "architectures": [OUR_CLASS],
    "rms_norm_eps": RMS_EPS,
    "tie_word_embeddings": False,
}
SETTLED = {  # fields with the one value that the network has here, which is also the class's default
    "model_type": MODEL_TYPE,
    "architectures": [CLASS],
    "hidden_act": "relu2",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
NOT_THE_NETWORK = {  # fields that say nothing of what the network computes
    *("_name_or_path", "attention_dropout", "auto_map", "dtype", "initializer_range", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
}


def transformers_name(path: str) -> str:
    """transformers' name of the parameter at a path such as "blocks/0/attn/c_q"; KeyError: it has no place for it."""
    pattern, layer = split_layer(path, "/")
    return NAMES_OF[pattern].replace("*", str(layer))


def fits_library(model: GPTConfig) -> bool:
    """Whether the library's own class computes this network; else it is ours that does."""
    rules = {name: value for name, value in ERAS["A"].fields.items() if name != "rope_base"}  # that can be any
    return all(getattr(model, name) == value for name, value in rules.items()) and set(model.windows) == {-1}


def transformers_config(model: GPTConfig, *, bos: int, eos: int, dtype: str) -> dict:
    """What config.json says of a network.

    bos, eos: ids of the tokens that begin a text and end an answer; the second is also the one to pad with. dtype: of
    the tensors, as "float32"."""
    common = {
        **{theirs: getattr(model, ours) for theirs, ours in SIZES.items()},
        "rms_norm_eps": RMS_EPS,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "dtype": dtype,
    }
    if not fits_library(model):
        classes = {"AutoConfig": f"{OUR_CODE}.NanochatJaxConfig", "AutoModelForCausalLM": f"{OUR_CODE}.{OUR_CLASS}"}
        network = {theirs: getattr(model, ours) for theirs, ours in OUR_FIELDS.items()}
        return {**OUR_SETTLED, "auto_map": classes, **common, **network}
    return {
        **{field: value for field, value in SETTLED.items() if value is not None},
        **common,
        "intermediate_size": 4 * model.n_embd,
        "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "final_logit_softcapping": model.logit_cap,
        "attention_dropout": 0.0,
    }


def transformers_tensors(params: dict, model: GPTConfig, dtype: np.dtype) -> dict[str, Tensor]:
    """transformers' name -> tensor of this type; the lambdas, of which there are few numbers, stay float32.

    The library's class has no rows that pad the vocabulary, so they are left out there."""
    tensors = {}
    for path, leaf in flatten_by_path(params).items():
        kept = leaf[: model.vocab_size] if fits_library(model) and path in ("wte", "lm_head") else leaf
        tensors[transformers_name(path)] = Tensor(kept.shape, dtype if kept.ndim > 1 else np.dtype(np.float32), [kept])
    return tensors


def config_of(fields: dict, vocab_size: int | None = None) -> GPTConfig:
    """The network that config.json describes. Refused: a field is missing, unknown, or says what the network lacks.

    vocab_size: of the tokenizer, where it has fewer tokens than the model rows; the other rows then are padding."""
    if fields.get("model_type") == OUR_TYPE:
        return _our_config_of(fields, vocab_size)
    if fields.get("model_type") != MODEL_TYPE:
        raise Refused(f"model_type must be {MODEL_TYPE!r} or {OUR_TYPE!r}, got {shown(fields.get('model_type'))}")
    numbers = {
        "intermediate_size",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "final_logit_softcapping",
    }
    if unknown := sorted(fields.keys() - SIZES.keys() - SETTLED.keys() - NOT_THE_NETWORK - numbers):
        raise Refused(f"it has fields this reader does not know, so the network may be another one: {listed(unknown)}")
    _require(fields, SETTLED)
    if fields.get("rms_norm_eps", 1e-6) not in (1e-6, RMS_EPS):
        raise Refused(f"rms_norm_eps must be 1e-06 or {RMS_EPS}, got {shown(fields['rms_norm_eps'])}")
    sizes = {ours: _whole_number(fields, theirs, 1, LIMITS[ours]) for theirs, ours in SIZES.items()}
    rows, D = sizes["vocab_size"], sizes["n_embd"]
    if fields.get("intermediate_size") != 4 * D:
        got = shown(fields.get("intermediate_size", "none"))
        raise Refused(f"intermediate_size must be 4 x hidden_size, {4 * D}, got {got}")
    if fields.get("head_dim", D / sizes["n_head"]) != D / sizes["n_head"]:
        raise Refused(f"head_dim must be hidden_size / num_attention_heads, got {shown(fields['head_dim'])}")
    if vocab_size is not None and vocab_size > rows:
        raise Refused(f"vocab_size must be at least the tokenizer's {vocab_size:,} tokens, got {rows:,}")
    try:
        return GPTConfig(
            **sizes | {"vocab_size": vocab_size or rows},
            padded_vocab=rows,
            windows=(-1,) * sizes["n_layer"],
            logit_cap=_number(fields, "final_logit_softcapping", 15.0),
            **ERAS["A"].fields | {"rope_base": _rope_base(fields)},
        )
    except Refused:
        raise
    except ValueError as e:  # sizes that do not fit together
        raise Refused(str(e)) from None


def _our_config_of(fields: dict, vocab_size: int | None) -> GPTConfig:
    """The same where it is of our class."""
    if unknown := sorted(fields.keys() - SIZES.keys() - OUR_FIELDS.keys() - OUR_SETTLED.keys() - NOT_THE_NETWORK):
        raise Refused(f"it has fields this reader does not know, so the network may be another one: {listed(unknown)}")
    _require(fields, OUR_SETTLED)
    values = {ours: _whole_number(fields, theirs, 1, LIMITS[ours]) for theirs, ours in SIZES.items()}
    for theirs, ours in OUR_FIELDS.items():
        kind, value = GPTConfig.__annotations__[ours], fields.get(theirs)
        if kind is int:
            value = _whole_number(fields, theirs, 1, LIMITS["vocab_size"])
        elif kind is float:
            value = _number(fields, theirs, math.nan, zero=ours == "value_embed_scale")
        elif kind is bool and type(value) is not bool:
            raise Refused(f"{theirs} must be true or false, got {shown(value)}")
        elif ours == "windows" and not _are_windows(value):
            raise Refused(f"windows must be a list of distances, or -1 for no limit, got {shown(value)}")
        values[ours] = value
    if vocab_size not in (None, values["vocab_size"]):
        raise Refused(f"vocab_size must be the tokenizer's {vocab_size:,} tokens, got {values['vocab_size']:,}")
    try:
        return GPTConfig(**values)
    except ValueError as e:  # values that do not fit together
        raise Refused(str(e)) from None


def _are_windows(value: object) -> bool:
    limit = LIMITS["sequence_len"]
    return isinstance(value, list) and all(type(window) is int and -1 <= window <= limit for window in value)


def _require(fields: dict, settled: dict) -> None:
    for field, value in settled.items():
        if fields.get(field, value) != value:
            raise Refused(f"{field} must be {shown(value)}, got {shown(fields[field])}")


def _whole_number(fields: dict, name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{name} must be an integer from {low} to {high:,}, got {shown(fields.get(name, 'none'))}")
    return value


def _rope_base(fields: dict) -> float:
    """The base of the rotary angles, which transformers keeps in rope_parameters since version 5, before by itself."""
    rope = fields.get("rope_parameters")
    if rope is None:
        return _number(fields, "rope_theta", 10_000.0)
    if not isinstance(rope, dict) or rope.keys() - {"rope_theta", "rope_type"} or "rope_theta" in fields:
        raise Refused(f"rope_parameters must hold rope_theta and rope_type only, got {shown(rope)}")
    if rope.get("rope_type", "default") != "default":
        raise Refused(f"rope_type must be 'default', got {shown(rope['rope_type'])}")
    return _number(rope, "rope_theta", 10_000.0)


def _number(fields: dict, name: str, default: float, *, zero: bool = False) -> float:
    """zero: whether it may be 0."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not (0 < value < LARGEST_NUMBER or (zero and value == 0)):
        raise Refused(f"{name} must be a number above 0 and below {LARGEST_NUMBER:.0e}, got {shown(value)}")
    return float(value)


def read_config(folder: Path, vocab_size: int | None = None) -> GPTConfig:
    """The network of the model in `folder`; its tensors are not read. vocab_size: as of `config_of`."""
    fields = read_json_object(folder / CONFIG)
    with naming_file(folder / CONFIG):
        return config_of(fields, vocab_size)


def read_model(folder: Path, vocab_size: int | None = None) -> tuple[GPTConfig, dict]:
    """(config, parameters as a nested dict of float32) of the model in `folder`. vocab_size: as of `config_of`."""
    config = read_config(folder, vocab_size)
    tensors = read_shards(folder)
    with naming_file(folder):
        return config, read_params(
            tensors, config, transformers_name, f"a {CLASS if fits_library(config) else OUR_CLASS}"
        )
