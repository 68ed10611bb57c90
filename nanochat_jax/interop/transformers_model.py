"""The form in which the transformers library keeps nanochat's models, class NanoChatForCausalLM: config.json and
safetensors. What that class computes is nanochat's network of era A (October 2025 to January 2026) and no other.

Its matrices are those of nanochat's own files under other names: (out, in), nothing is transposed or permuted. Its
norms add 1e-6 where nanochat's add 1.2e-7, which moves a logit by less than 1e-4.
"""

import json
from pathlib import Path

from nanochat_jax.files.plain_pickle import Refused, naming_file
from nanochat_jax.files.safetensors_read import read_shards
from nanochat_jax.interop.nanochat_model import ERAS, LIMITS, listed, read_params, shown, split_layer
from nanochat_jax.model.gpt import GPTConfig

CONFIG = "config.json"
LARGEST_NUMBER = 1e12  # that a field may be
MODEL_TYPE, CLASS = "nanochat", "NanoChatForCausalLM"
NAMES = {  # transformers' name of a tensor -> our path; * stands for the layer
    "model.embed_tokens.weight": "wte",
    "lm_head.weight": "lm_head",
    "model.layers.*.self_attn.q_proj.weight": "blocks/*/attn/c_q",
    "model.layers.*.self_attn.k_proj.weight": "blocks/*/attn/c_k",
    "model.layers.*.self_attn.v_proj.weight": "blocks/*/attn/c_v",
    "model.layers.*.self_attn.o_proj.weight": "blocks/*/attn/c_proj",
    "model.layers.*.mlp.fc1.weight": "blocks/*/mlp/c_fc",
    "model.layers.*.mlp.fc2.weight": "blocks/*/mlp/c_proj",
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
SETTLED = {  # fields with the one value that the network has here, which is also the class's default
    "model_type": MODEL_TYPE,
    "architectures": [CLASS],
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-6,
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


def transformers_config(model: GPTConfig, *, bos: int, eos: int, dtype: str) -> dict:
    """What config.json says of a network whose padding rows are left out of its tensors.

    bos, eos: ids of the tokens that begin a text and end an answer; the class pads with the second. dtype: of the
    tensors, as "float32". ValueError: a network that the class does not compute."""
    era = ERAS["A"].fields
    unfit = [f"{name}={getattr(model, name)}" for name, value in era.items() if getattr(model, name) != value]
    unfit = [field for field in unfit if not field.startswith("rope_base=")]  # any base can be written
    if any(0 <= window < model.sequence_len for window in model.windows):
        unfit.append(f"windows={model.windows}"[:80])
    if unfit:
        raise ValueError(
            f"{CLASS} computes nanochat's network of before 2026-01-11 only; in this one it has no place for "
            f"{', '.join(unfit)}"
        )
    return {
        **SETTLED,
        **{theirs: getattr(model, ours) for theirs, ours in SIZES.items()},
        "intermediate_size": 4 * model.n_embd,
        "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "final_logit_softcapping": model.logit_cap,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "dtype": dtype,
    }


def config_of(fields: dict, vocab_size: int | None = None) -> GPTConfig:
    """The network that config.json describes. Refused: a field is missing, unknown, or says what the network lacks.

    vocab_size: of the tokenizer, where it has fewer tokens than the model rows; the other rows then are padding."""
    if fields.get("model_type") != MODEL_TYPE:
        raise Refused(f"model_type must be {MODEL_TYPE!r}, got {shown(fields.get('model_type'))}")
    numbers = {"intermediate_size", "head_dim", "rope_theta", "rope_parameters", "final_logit_softcapping"}
    if unknown := sorted(fields.keys() - SIZES.keys() - SETTLED.keys() - NOT_THE_NETWORK - numbers):
        raise Refused(f"it has fields this reader does not know, so the network may be another one: {listed(unknown)}")
    for field, value in SETTLED.items():
        if fields.get(field, value) != value:
            raise Refused(f"{field} must be {shown(value)}, got {shown(fields[field])}")
    sizes = {}
    for theirs, ours in SIZES.items():
        if type(fields.get(theirs)) is not int or not 1 <= fields[theirs] <= LIMITS[ours]:
            must = f"{theirs} must be an integer from 1 to {LIMITS[ours]:,}"
            raise Refused(f"{must}, got {shown(fields.get(theirs, 'none'))}")
        sizes[ours] = fields[theirs]
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


def _number(fields: dict, name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
        raise Refused(f"{name} must be a number above 0 and below {LARGEST_NUMBER:.0e}, got {shown(value)}")
    return float(value)


def read_config(folder: Path, vocab_size: int | None = None) -> GPTConfig:
    """The network of the model in `folder`; its tensors are not read. vocab_size: as of `config_of`."""
    path = folder / CONFIG
    with naming_file(path):
        try:
            fields = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as e:
            raise Refused(f"it is not JSON ({e})") from None
        if not isinstance(fields, dict):
            raise Refused("it must be an object")
        return config_of(fields, vocab_size)


def read_model(folder: Path, vocab_size: int | None = None) -> tuple[GPTConfig, dict]:
    """(config, parameters as a nested dict of float32) of the model in `folder`. vocab_size: as of `config_of`."""
    config = read_config(folder, vocab_size)
    tensors = read_shards(folder)
    with naming_file(folder):
        return config, read_params(tensors, config, transformers_name, f"a {CLASS}")
