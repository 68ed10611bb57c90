"""A tiny model in the form that transformers saves: config.json, safetensors and tokenizer.json, made by hand."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tokenizer import Tokenizer
from tests.support import tiny

EARLY = GPTConfig(  # the network of nanochat's first months, which the class of transformers has
    sequence_len=64,
    vocab_size=265,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=64,
    padded_vocab=265,
    windows=(-1, -1),
    rope_base=10_000.0,
    qk_scale=1.0,
    residual_lambdas=False,
    value_embed_scale=0.0,
    smear=False,
    backout=False,
)
FIELDS = {  # of config.json, written out as the library writes them
    "architectures": ["NanoChatForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 256,
    "dtype": "float32",
    "eos_token_id": 260,
    "final_logit_softcapping": 15.0,
    "hidden_act": "relu2",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "model_type": "nanochat",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 260,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "vocab_size": 265,
}
OF_A_LAYER = {
    "attn/c_q": "self_attn.q_proj",
    "attn/c_k": "self_attn.k_proj",
    "attn/c_v": "self_attn.v_proj",
    "attn/c_proj": "self_attn.o_proj",
    "mlp/c_fc": "mlp.fc1",
    "mlp/c_proj": "mlp.fc2",
}
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "F64": np.float64}


def tensors(seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
    """(float32 tensors under transformers' names, the same as our parameters)."""
    params = jax.tree.map(np.asarray, tiny.random_state(EARLY, seed)[0].params)
    by_path = flatten_by_path(params)
    named = {"model.embed_tokens.weight": by_path["wte"], "lm_head.weight": by_path["lm_head"]}
    for i in range(EARLY.n_layer):
        named |= {f"model.layers.{i}.{n}.weight": by_path[f"blocks/{i}/{ours}"] for ours, n in OF_A_LAYER.items()}
    return named, params


def safetensors(arrays: dict[str, np.ndarray], kind: str = "F32", metadata: dict | None = None) -> bytes:
    """The bytes of a safetensors file."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, array in arrays.items():
        body = np.asarray(array).astype(KINDS[kind]).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    return packed(header, data)


def packed(header: object, data: bytes, length: int | None = None) -> bytes:
    """A header, as JSON if it is not bytes, and data as a safetensors file; length: what is claimed of the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def fast_tokenizer(tokenizer: Tokenizer) -> dict:
    """tokenizer.json of transformers, with all pairs of tokens that make a token as merges, in the order of these."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    character = dict(zip([*visible, *hidden], [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]))

    def text(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    ranks = tokenizer.mergeable_ranks
    merges = [
        [text(token[:cut]), text(token[cut:])]
        for token in sorted(ranks, key=ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level | {"add_prefix_space": True},
        "decoder": level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text(token): i for token, i in ranks.items()},
            "merges": merges,
        },
    }


def write_transformers(folder: Path, *, shards: int = 1, kind: str = "F32", seed: int = 0) -> dict:
    """A model in so many files -> its parameters."""
    named, params = tensors(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FIELDS))
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer(tiny.tokenizer())))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(named, kind))
        return params
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(named)}
    for file in files:
        part = {name: array for name, array in named.items() if where[name] == file}
        (folder / file).write_bytes(safetensors(part, kind))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return params
