"""The golden folder's models through the project's own importer, and arrays under nanochat's parameter names."""

import functools

import jax
import numpy as np
from flax import nnx

from nanochat_jax.checkpoint import find_model, flat, load_params
from nanochat_jax.gpt import GPT, GPTConfig, abstract_gpt
from nanochat_jax.nanochat_import import nanochat_name, our_path
from tests.golden import data

UNROUNDED = "_fp32rope"  # files computed with float32 rotary tables, in eras that rounded them to bfloat16


@functools.cache
def load(name: str) -> tuple[GPTConfig, dict, dict]:
    """(config, parameters as nested dict, meta) of checkpoints/<name>."""
    data.path(f"checkpoints/{name}/base_checkpoints")
    return load_params(find_model("base", base=data.GOLDEN / "checkpoints" / name))


def built(config: GPTConfig, params: dict) -> GPT:
    return nnx.merge(abstract_gpt(config)[0], params)


def measured(folder: str) -> list[str]:
    """Names of the models that have a file in `folder`, for parametrize."""
    return sorted({name.removesuffix(UNROUNDED) for name in data.names(folder)})


def arrays(folder: str, name: str) -> dict[str, np.ndarray]:
    """The model's file in `folder`: that with unrounded rotary tables where there are two, as ours are not rounded."""
    unrounded = f"{folder}/{name}{UNROUNDED}.npz"
    return data.arrays(unrounded if (data.GOLDEN / unrounded).exists() else f"{folder}/{name}.npz")


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose key begins with `prefix`, by the rest of the key."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def by_name(tree: dict) -> dict[str, np.ndarray]:
    """A parameter tree as a flat dict under nanochat's names."""
    return {nanochat_name(path): np.asarray(leaf) for path, leaf in flat(tree).items()}


def tree(named: dict[str, np.ndarray]) -> dict:
    """The other way round."""
    result = {}
    for name, array in named.items():
        *parents, last = our_path(name)
        node = result
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jax.numpy.asarray(array)
    return result
