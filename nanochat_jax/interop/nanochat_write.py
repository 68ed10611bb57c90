"""A model of ours as the content of nanochat's files: the tensors and the metadata that today's nanochat reads."""

import collections
import dataclasses

import ml_dtypes
import numpy as np

from nanochat_jax.distributed import sharding
from nanochat_jax.files.torch_write import Tensor
from nanochat_jax.interop.nanochat_model import LIMITS, nanochat_name
from nanochat_jax.interop.nanochat_optimizer import NEWTON_SCHULZ_STEPS, Merge
from nanochat_jax.model.gpt import GPTConfig, window_sizes

EMBEDDING_TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
OURS = {"tokenizer", "optimizer_groups"}  # in meta, for our own loaders only
SIZES = ("device_batch_size", "max_seq_len", "total_batch_size")  # nanochat's SFT inherits them from the top of meta


def model_config(model: GPTConfig, pattern: object = None) -> dict:
    """nanochat's model_config of this network, with window pattern `pattern` where that gives the model's windows.

    ValueError: a network that today's nanochat cannot build.
    """
    today = {f.name: f.default for f in dataclasses.fields(GPTConfig) if f.default is not dataclasses.MISSING}
    today["padded_vocab"] = -(-model.vocab_size // 64) * 64
    unfit = [f"{name}={getattr(model, name)}" for name, value in today.items() if getattr(model, name) != value]
    letters = "".join("L" if window == model.sequence_len else "S" for window in model.windows)
    patterns = [letters[:n] for n in range(1, model.n_layer + 1)]  # the shortest that fits; the last layer is always L
    if isinstance(pattern, str) and pattern and set(pattern) <= {"S", "L"}:
        patterns.insert(0, pattern)
    fits = [p for p in patterns if window_sizes(p, model.n_layer, model.sequence_len) == model.windows]
    if not fits:
        unfit.append(f"windows={model.windows}"[:80])
    if unfit:
        raise ValueError(
            "only networks as nanochat builds them since 2026-03-14 can be exported; in this one it has no place for "
            f"{', '.join(unfit)}"
        )
    return {name: getattr(model, name) for name in LIMITS} | {"window_pattern": fits[0]}


def nanochat_meta(meta: dict, model: GPTConfig, step: int) -> dict:
    """The meta file of a checkpoint of ours: what its own meta records, with sizes and names where nanochat looks; of a
    converted one nanochat's own. ValueError: a network that today's nanochat cannot build."""
    settings = meta.get("user_config") if isinstance(meta.get("user_config"), dict) else {}
    network = model_config(model, settings.get("window_pattern"))
    if "nanochat_meta" in meta:
        return meta["nanochat_meta"]
    sizes = {name: settings[name] for name in SIZES if settings.get(name) is not None}
    kept = {name: value for name, value in meta.items() if name not in OURS}
    return {"step": step, **sizes, **kept, "model_config": network}


def model_content(params: dict, embedding_type: np.dtype) -> dict[str, Tensor]:
    """The state dict: nanochat's name -> tensor."""
    content = collections.OrderedDict()
    for path, leaf in sharding.flatten_by_path(params).items():
        content[nanochat_name(path)] = Tensor(leaf.shape, stored_type(path, embedding_type), [leaf])
    return content


def stored_type(path: str, embedding_type: np.dtype) -> np.dtype:
    """nanochat trains token and value embeddings in the compute type, bfloat16 on a GPU, all else in float32."""
    return embedding_type if path == "wte" or path.endswith("/value_embed") else np.dtype(np.float32)


def optimizer_content(state: dict, model: GPTConfig, embedding_type: np.dtype) -> dict:
    """The state dict of nanochat's optimizer on one rank, from a state in the form of `read_optimizer`."""
    layout, settings = Merge([], model), {group["name"]: group for group in state["groups"]}
    content = {"state": {}, "param_groups": []}
    first = 0

    def add_group(group: dict, members: list[str], keys: tuple[str, ...]) -> None:
        values = {key: tuple(group[key]) if key == "betas" else group[key] for key in keys}
        numbers = list(range(first, first + len(members)))
        content["param_groups"].append({"kind": group["kind"], **values, "params": numbers})

    for name, paths in layout.adamw_groups().items():
        for number, path in enumerate(paths, first):
            kind = stored_type(path, embedding_type)
            moments = {key: state[key][path] for key in ("exp_avg", "exp_avg_sq")}
            tensors = {key: Tensor(array.shape, kind, [array]) for key, array in moments.items()}
            content["state"][number] = {"step": state["count"][path], **tensors}
        add_group(settings[name], paths, ("lr", "betas", "eps", "weight_decay", "initial_lr"))
        first += len(paths)
    matrix = settings["matrix"] | {"ns_steps": NEWTON_SCHULZ_STEPS}
    for shape in sorted({layout.shapes[path] for path in layout.matrices}):
        paths = [path for path in layout.matrices if layout.shapes[path] == shape]
        content["state"][first] = {
            f"{key}_buffer": _stacked([state[key][path] for path in paths]) for key in ("momentum", "second_momentum")
        }
        add_group(matrix, paths, ("lr", "momentum", "ns_steps", "beta2", "weight_decay", "initial_lr"))
        first += len(paths)
    return content


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    return Tensor((len(arrays), *arrays[0].shape), np.dtype(np.float32), arrays)
