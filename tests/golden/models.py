"""The golden folder's models through the project's own importer, and arrays under nanochat's parameter names."""

import functools
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from flax import nnx

from nanochat_jax.checkpoints.find import find_model, load_params
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.interop.nanochat_model import nanochat_name, our_path
from nanochat_jax.model import gpt
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt
from tests.golden import data

UNROUNDED = "_fp32rope"  # files computed with float32 rotary tables, in eras that rounded them to bfloat16


@functools.cache
def load(name: str) -> tuple[GPTConfig, dict, dict]:
    """(config, parameters as nested dict, meta) of checkpoints/<name>."""
    data.path(f"checkpoints/{name}/base_checkpoints")
    return load_params(find_model("base", base=data.GOLDEN / "checkpoints" / name))


def built(config: GPTConfig, params: dict) -> GPT:
    return nnx.merge(abstract_gpt(config)[0], params)


def of_file(file: str) -> str:
    """Name of the model that a file of forward/, decode/ or grads/ (without .npz) is about."""
    return file.removesuffix(UNROUNDED)


@contextmanager
def rotary_tables_of(file: str):
    """While a model is traced inside, its rotary tables are rounded as those were that `file` was computed with.

    Ours never are. nanochat's were until 2026-03, when the rotary base was 10000.
    """

    def rounded(*args):
        return tuple(jax.lax.reduce_precision(table, 8, 7) for table in exact(*args))  # to bfloat16

    exact = gpt.rotary
    with pytest.MonkeyPatch.context() as patch:
        if not file.endswith(UNROUNDED) and load(of_file(file))[0].rope_base == 10_000:
            patch.setattr(gpt, "rotary", rounded)
        yield


def under(prefix: str, record: dict) -> dict:
    """The entries whose key begins with `prefix`, by the rest of the key."""
    entries = {key.removeprefix(prefix): array for key, array in record.items() if key.startswith(prefix)}
    return data.Record(f"{record.source}, {prefix}*,", entries) if isinstance(record, data.Record) else entries


def by_name(tree: dict) -> dict[str, np.ndarray]:
    """A parameter tree as a flat dict under nanochat's names."""
    return {nanochat_name(path): np.asarray(leaf) for path, leaf in flatten_by_path(tree).items()}


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
