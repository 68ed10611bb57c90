"""Read nanochat's checkpoints of every era: model_SSSSSS.pt and meta_SSSSSS.json become a GPTConfig and parameters.

Parameters are a nested dict of float32 arrays in torch's (out, in) layout, with layer numbers as int keys. A path in it
is a tuple such as ("blocks", 0, "attn", "c_q"), or text: "blocks/0/attn/c_q". Eras differ in which tensors exist and in
numbers that no file records (rotary base, query/key scale, window rule); the tensors tell which era a file is from.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from nanochat_jax.files.json_read import read_json_object
from nanochat_jax.files.plain_pickle import Refused, naming_file
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.model.gpt import SMEAR_CHANNELS, GPTConfig

# nanochat's name of a tensor -> our path; * stands for the layer
NAMES = {
    "transformer.wte.weight": "wte",
    "lm_head.weight": "lm_head",
    "transformer.h.*.attn.c_q.weight": "blocks/*/attn/c_q",
    "transformer.h.*.attn.c_k.weight": "blocks/*/attn/c_k",
    "transformer.h.*.attn.c_v.weight": "blocks/*/attn/c_v",
    "transformer.h.*.attn.c_proj.weight": "blocks/*/attn/c_proj",
    "transformer.h.*.attn.ve_gate.weight": "blocks/*/attn/ve_gate",
    "transformer.h.*.mlp.c_fc.weight": "blocks/*/mlp/c_fc",
    "transformer.h.*.mlp.c_proj.weight": "blocks/*/mlp/c_proj",
    "value_embeds.*.weight": "blocks/*/attn/value_embed",
    "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas",
    "smear_gate.weight": "smear_gate",
    "smear_lambda": "smear_lambda",
    "backout_lambda": "backout_lambda",
}
NAMES_OF = {path: name for name, path in NAMES.items()}


class Era(NamedTuple):
    """What nanochat's code computed in an era and its files do not record."""

    fields: dict  # of GPTConfig, where they differ from its defaults
    short_window: Callable[[int], int] | None  # of a layer "S", from sequence_len; None: every layer sees everything


def _part_in_blocks(parts: int) -> Callable[[int], int]:
    """1/parts of the sequence; it and the number of blocks of 128 are rounded up."""
    return lambda sequence_len: 128 * math.ceil(math.ceil(sequence_len / parts) / 128)


_EARLY = {"rope_base": 10_000.0, "qk_scale": 1.0, "smear": False, "backout": False}
ERAS = {  # since 2025-10-13 (A) to since 2026-03-14 (E)
    "A": Era({**_EARLY, "residual_lambdas": False, "value_embed_scale": 0.0}, None),
    "B": Era({**_EARLY, "value_embed_scale": 0.0}, lambda sequence_len: sequence_len // 2),
    "C": Era({**_EARLY, "value_embed_scale": 2.0, "value_gate_channels": 32}, lambda sequence_len: sequence_len // 2),
    "D": Era({"qk_scale": 1.15, "smear": False, "backout": False}, _part_in_blocks(3)),
    "E": Era({}, _part_in_blocks(4)),
}

LIMITS = {  # the largest values that a file may have: far above any model, and no damaged file makes us allocate more
    "sequence_len": 1 << 24,
    "vocab_size": 1 << 24,
    "n_layer": 1024,
    "n_head": 1 << 12,
    "n_kv_head": 1 << 12,
    "n_embd": 1 << 17,
}


def our_path(name: str) -> tuple:
    """The path of nanochat's tensor `name` among our parameters; KeyError where nanochat has no such tensor."""
    pattern, layer = split_layer(name, ".")
    return tuple(layer if part == "*" else part for part in NAMES[pattern].split("/"))


def nanochat_name(path: tuple | str) -> str:
    """nanochat's name of the parameter at this path."""
    pattern, layer = split_layer(path if isinstance(path, str) else "/".join(map(str, path)), "/")
    return NAMES_OF[pattern].replace("*", str(layer))


def split_layer(text: str, separator: str) -> tuple[str, int | None]:
    """("blocks/*/attn/c_q", 3) for "blocks/3/attn/c_q"."""
    parts = text.split(separator)
    layers = [part for part in parts if re.fullmatch("0|[1-9][0-9]{0,8}", part)]
    if "*" in parts:
        raise KeyError(text)
    return separator.join("*" if part in layers else part for part in parts), int(layers[0]) if layers else None


def find_steps(folder: Path) -> list[int]:
    """Steps of which `folder` holds both model_SSSSSS.pt and meta_SSSSSS.json, ascending; never empty."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}: pass one of the folders beside it with --model-tag")
    steps = [int(found[1]) for p in folder.iterdir() if (found := re.fullmatch(r"model_([0-9]{6,})\.pt", p.name))]
    complete = sorted(s for s in steps if model_file(folder, s).exists() and meta_file(folder, s).exists())
    if not complete:
        reason = f"{meta_file(folder, max(steps)).name} is missing" if steps else "it has no model_*.pt"
        raise FileNotFoundError(f"no nanochat checkpoint in {folder} ({reason}): pass another folder with --model-tag")
    return complete


def model_file(folder: Path, step: int) -> Path:
    """Where nanochat keeps a step's parameters."""
    return folder / f"model_{step:06d}.pt"


def meta_file(folder: Path, step: int) -> Path:
    """Where nanochat keeps a step's sizes and settings."""
    return folder / f"meta_{step:06d}.json"


def read_model(folder: Path, step: int, logit_cap: float = 15.0) -> tuple[GPTConfig, dict, dict]:
    """(config, parameters, meta file) of nanochat's checkpoint at `step`.

    logit_cap: 20 for models trained 2026-03-02 to 03-09, which cannot be told from the files.
    """
    era, config, tensors, meta = _open_checkpoint(folder, step, logit_cap)
    with naming_file(model_file(folder, step)):
        return config, read_params(tensors, config, nanochat_name, f"a model of era {era}"), meta


def read_params(tensors: dict, config: GPTConfig, name_of: Callable[[str], str], what: str) -> dict:
    """The parameters of a network from tensors by name, which are taken out of `tensors` one by one.

    name_of: from a path to the tensor's name. what: begins the sentence of a Refused if one is missing or unknown."""
    shapes = {path: (name_of(path), shape) for path, shape in tensor_shapes(config).items()}
    names = {name for name, _ in shapes.values()}
    if missing := sorted(names - tensors.keys()):
        raise Refused(f"{what} with {config.n_layer} layers needs {listed(missing)}")
    if unknown := sorted(tensors.keys() - names):
        raise Refused(f"{what} with {config.n_layer} layers has no {listed(unknown)}")
    params = {path: to_float32(tensors.pop(name), shape, name) for path, (name, shape) in shapes.items()}
    return unflatten_dict({our_path(nanochat_name(path)): array for path, array in params.items()})


def read_config(folder: Path, step: int) -> GPTConfig:
    """The network of nanochat's checkpoint at `step`; its tensors are not read."""
    return _open_checkpoint(folder, step)[1]


def _open_checkpoint(folder: Path, step: int, logit_cap: float = 15.0) -> tuple[str, GPTConfig, dict, dict]:
    """(era, config, tensors as views of the file, meta)"""
    for path in (model_file(folder, step), meta_file(folder, step)):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: pass another --model-step or --model-tag")
    meta = read_meta_file(meta_file(folder, step))
    content = read_pt(model_file(folder, step))
    with naming_file(model_file(folder, step)):
        tensors = strip_prefix(content)
        era = find_era(tensors)
    with naming_file(meta_file(folder, step)):
        return era, era_config(era, meta["model_config"], tensors, logit_cap), tensors, meta


def read_meta_file(path: Path) -> dict:
    """What a meta file holds; only that its model_config is a dict has been checked."""
    meta = read_json_object(path)
    with naming_file(path):
        if not isinstance(meta.get("model_config"), dict):
            raise Refused("it must be an object with a field model_config, itself an object")
        return meta


def strip_prefix(tensors: object) -> dict:
    """The state dict without the _orig_mod. that torch.compile puts before the names of some files."""
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise Refused(f"a model file holds tensors by name, got {type(tensors).__name__}")
    stripped = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise Refused("it holds a tensor twice, with and without _orig_mod. before its name")
    for name, tensor in stripped.items():
        if not isinstance(tensor, np.ndarray):
            raise Refused(f"{name} must be a tensor, got {type(tensor).__name__}")
    return stripped


def find_era(tensors: dict) -> str:
    """Which code wrote a state dict: "A" (2025-10-13) to "E" (since 2026-03-14)."""
    tensors = strip_prefix(tensors)
    if "smear_gate.weight" in tensors:
        return "E"
    gates = {
        name: t.shape[-1:]
        for name, t in tensors.items()
        if re.fullmatch(r"transformer\.h\.\d+\.attn\.ve_gate\.weight", name)
    }
    for era, channels in (("D", 12), ("C", 32)):
        if (channels,) in gates.values():
            return era
    if gates:
        name, columns = min(gates.items())
        raise Refused(f"{name} must have 12 or 32 columns, got {columns[0] if columns else 'a number'}")
    return "B" if "resid_lambdas" in tensors else "A"


def era_config(era: str, model_config: dict, tensors: dict, logit_cap: float = 15.0) -> GPTConfig:
    """The network that the code of `era` builds from a meta file's model_config; errors name the field."""
    if unknown := sorted(model_config.keys() - {*LIMITS, "window_pattern"}):
        raise Refused(f"model_config has fields this reader does not know: {listed(unknown)}")
    fields = {}
    for field, limit in LIMITS.items():
        value = model_config.get(field)
        if field not in model_config:
            raise Refused(f"model_config has no {field}")
        if type(value) is not int or not 1 <= value <= limit:
            raise Refused(f"model_config's {field} must be an integer from 1 to {limit:,}, got {shown(value)}")
        fields[field] = value
    N, K, D = fields["n_head"], fields["n_kv_head"], fields["n_embd"]
    if D % N or D // N % 2:
        raise Refused(f"model_config's n_embd must be an even multiple of n_head, got n_embd {D}, n_head {N}")
    if N % K:
        raise Refused(f"model_config's n_head must be a multiple of n_kv_head, got n_head {N}, n_kv_head {K}")
    rules = ERAS[era]
    channels = max(SMEAR_CHANNELS * rules.fields.get("smear", True), rules.fields.get("value_gate_channels", 12))
    if era in "CDE" and channels > D:
        raise Refused(f"model_config's n_embd must be at least {channels} in era {era}, got {D}")
    wte = tensors.get("transformer.wte.weight")
    if wte is None or wte.ndim != 2:
        raise Refused(f"a model needs transformer.wte.weight with 2 axes, got {None if wte is None else wte.shape}")
    if wte.shape[0] < fields["vocab_size"]:
        raise Refused(
            f"model_config's vocab_size must be at most the {wte.shape[0]} rows of wte, got {fields['vocab_size']}"
        )
    windows = _windows(era, model_config, fields["n_layer"], fields["sequence_len"])
    return GPTConfig(**fields, padded_vocab=wte.shape[0], windows=windows, logit_cap=logit_cap, **rules.fields)


def _windows(era: str, model_config: dict, n_layer: int, sequence_len: int) -> tuple[int, ...]:
    """How far back each layer sees; the last one is always L."""
    short_window = ERAS[era].short_window
    if short_window is None:
        return (-1,) * n_layer
    pattern = model_config.get("window_pattern", "L" if era == "B" else None)
    if not isinstance(pattern, str) or not 1 <= len(pattern) <= LIMITS["n_layer"] or set(pattern.upper()) - {*"SL"}:
        raise Refused(f"model_config's window_pattern must be letters S and L, got {shown(pattern)}")
    letters = [pattern.upper()[i % len(pattern)] for i in range(n_layer - 1)] + ["L"]
    return tuple(sequence_len if letter == "L" else short_window(sequence_len) for letter in letters)


def tensor_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, the matrices of the blocks in nanochat's model order."""
    D, V, kv = config.n_embd, config.padded_vocab, config.kv_dim
    shapes = {"wte": (V, D), "lm_head": (V, D)}
    for i in range(config.n_layer):
        block = {"attn/c_q": (D, D), "attn/c_k": (kv, D), "attn/c_v": (kv, D), "attn/c_proj": (D, D)}
        if config.has_value_embed(i):
            block |= {"attn/ve_gate": (config.n_kv_head, config.value_gate_channels), "attn/value_embed": (V, kv)}
        block |= {"mlp/c_fc": (4 * D, D), "mlp/c_proj": (D, 4 * D)}
        shapes |= {f"blocks/{i}/{name}": shape for name, shape in block.items()}
    if config.residual_lambdas:
        shapes |= {"resid_lambdas": (config.n_layer,), "x0_lambdas": (config.n_layer,)}
    if config.smear:
        shapes |= {"smear_gate": (1, SMEAR_CHANNELS), "smear_lambda": (1,)}
    return shapes | ({"backout_lambda": (1,)} if config.backout else {})


def to_float32(tensor: object, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A float32 copy of a floating tensor of 16 or 32 bits that has this shape and no infinities or NaNs."""
    if not isinstance(tensor, np.ndarray):
        raise Refused(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype.name not in ("float32", "bfloat16", "float16"):
        raise Refused(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype.name}")
    if tensor.shape != shape:
        raise Refused(f"{name} must have shape {shape}, got {tensor.shape}")
    wide = np.array(tensor, np.float32)
    if not np.isfinite(wide).all():
        raise Refused(f"{name} must be finite, but {int((~np.isfinite(wide)).sum())} of its numbers are not")
    return wide


def listed(names: list) -> str:
    """The first names, and how many more there are."""
    return ", ".join(str(name)[:60] for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def shown(value: object) -> str:
    """A JSON value, cut short."""
    return json.dumps(value, default=repr)[:60]


_meta_file, _read_meta = meta_file, read_meta_file  # until checkpoints/find.py is rewritten
