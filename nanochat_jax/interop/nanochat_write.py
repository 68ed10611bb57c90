"""A model of ours as the content of nanochat's files: the tensors and the metadata that today's nanochat reads."""

import collections
import dataclasses

import ml_dtypes
import numpy as np

from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files.torch_write import Tensor
from nanochat_jax.interop.nanochat_model import LIMITS, nanochat_name, tensor_shapes
from nanochat_jax.interop.nanochat_optimizer import chunk_of_rank, rows_of_rank
from nanochat_jax.interop.optimizer_state import OptimizerState, group_paths
from nanochat_jax.model.gpt import GPTConfig, window_sizes

EMBEDDING_TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NEWTON_SCHULZ_STEPS = 5  # iterations of nanochat's Muon; its files record them
ADAMW_KEYS = ("kind", "lr", "betas", "eps", "weight_decay", "initial_lr", "params")  # of a group, in nanochat's order
MUON_KEYS = ("kind", "lr", "momentum", "ns_steps", "beta2", "weight_decay", "initial_lr", "params")
ONLY_OURS = {"tokenizer", "optimizer_groups"}  # fields of meta that only our own loaders read
SIZES = ("device_batch_size", "max_seq_len", "total_batch_size")  # nanochat's SFT inherits them from the top of meta


def model_config(model: GPTConfig, pattern: object = None) -> dict:
    """nanochat's model_config of this network, with `pattern` as its window pattern where that gives the same windows.

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
    """The meta file of a checkpoint of ours: what its own meta records, with sizes and names where nanochat looks.

    A model that was converted gets nanochat's own back. ValueError: a network that today's nanochat cannot build.
    """
    settings = meta.get("user_config") if isinstance(meta.get("user_config"), dict) else {}
    network = model_config(model, settings.get("window_pattern"))
    if "nanochat_meta" in meta:
        return meta["nanochat_meta"]
    sizes = {name: settings[name] for name in SIZES if settings.get(name) is not None}
    kept = {name: value for name, value in meta.items() if name not in ONLY_OURS}
    return {"step": step, **sizes, **kept, "model_config": network}


def model_content(params: dict, embedding_type: np.dtype) -> dict[str, Tensor]:
    """The state dict: nanochat's name -> tensor."""
    return collections.OrderedDict(
        (nanochat_name(path), Tensor(leaf.shape, stored_type(path, embedding_type), [leaf]))
        for path, leaf in flatten_by_path(params).items()
    )


def stored_type(path: str, embedding_type: np.dtype) -> np.dtype:
    """nanochat trains token and value embeddings in the compute type, bfloat16 on a GPU, all else in float32."""
    return embedding_type if path == "wte" or path.endswith("/value_embed") else np.dtype(np.float32)


def check_ranks(model: GPTConfig, ranks: int) -> None:
    """ValueError: so many ranks of nanochat cannot share the optimizer's state of this network."""
    shapes = tensor_shapes(model)
    for path in [path for group, paths in group_paths(shapes).items() if group != "matrix" for path in paths]:
        try:
            rows_of_rank(path, shapes[path], ranks)
        except ValueError as error:
            raise ValueError(f"--ranks={ranks}: {error}; choose a divisor of {shapes[path][0]}") from None


def optimizer_content(
    state: OptimizerState, model: GPTConfig, embedding_type: np.dtype, rank: int = 0, ranks: int = 1
) -> dict:
    """The state dict of nanochat's optimizer on one of its ranks.

    AdamW's moments are cut by rows, Muon's buffers by matrices, as `read_optimizer` puts them together.
    """
    shapes = tensor_shapes(model)
    groups = group_paths(shapes)
    matrices = groups.pop("matrix")
    content = {"state": {}, "param_groups": []}

    def add_group(name: str, paths: list[str], keys: tuple[str, ...]) -> list[int]:
        """The numbers of its parameters, which go on from the last group's."""
        first = sum(len(group["params"]) for group in content["param_groups"])
        numbers = list(range(first, first + len(paths)))
        fields = {**state.groups[name]._asdict(), "ns_steps": NEWTON_SCHULZ_STEPS, "params": numbers}
        content["param_groups"].append({key: fields[key] for key in keys})
        return numbers

    for name, paths in groups.items():
        for number, path in zip(add_group(name, paths, ADAMW_KEYS), paths):
            kind = stored_type(path, embedding_type)
            content["state"][number] = {"step": int(state.arrays[f"count/{name}"])}
            for key in ("exp_avg", "exp_avg_sq"):
                array = state.arrays[f"{key}/{path}"]
                rows = rows_of_rank(path, array.shape, ranks)
                part = array if rows == len(array) else array[rank * rows : (rank + 1) * rows]
                content["state"][number][key] = Tensor(part.shape, kind, [part])
    for shape in sorted({shapes[path] for path in matrices}):
        paths = [path for path in matrices if shapes[path] == shape]
        entry = content["state"][add_group("matrix", paths, MUON_KEYS)[0]] = {}
        chunk, own = chunk_of_rank(paths, rank, ranks)
        for key in ("momentum", "second_momentum"):
            of_one = state.arrays[f"{key}/{paths[0]}"].shape
            padding = [np.zeros(of_one, np.float32)] * (chunk - len(own))  # nanochat's buffers are equally long
            arrays = [state.arrays[f"{key}/{path}"] for path in own] + padding
            entry[f"{key}_buffer"] = Tensor((chunk, *of_one), np.dtype(np.float32), arrays)
    return content
