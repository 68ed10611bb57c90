"""What the tools in this folder predict: nanochat's model of a depth on a TPU slice, as the Plan of its SFT run there.

A case is depth:slice, then in any order a mesh and `replicate`: d20:v5e-8, d34:v6e-256:model=2, d20:v5e-8:replicate.
"""

import contextlib
import sys
from typing import NamedTuple

from jax.sharding import Mesh

from nanochat_jax import sft
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed import compile_only
from nanochat_jax.distributed.mesh import make_mesh, row_shards
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.train import scaling_laws
from nanochat_jax.train.plan import Plan

WINDOW_PATTERN = "SSSL"  # nanochat's


class Case(NamedTuple):
    depth: int
    slice: str  # or NVIDIA GPUs, as h100-8
    mesh: str = ""
    replicate: bool = False

    @property
    def kind(self) -> str:
        """v5e, v5p or v6e"""
        return self.slice.partition("-")[0]


def parse_case(text: str) -> Case:
    """ValueError: the text has not the form of a case."""
    depth, _, rest = text.partition(":")
    slice_name, *more = rest.split(":")
    require(
        depth.startswith("d") and depth[1:].isdecimal() and int(depth[1:]) > 0 and bool(slice_name),
        f"--cases must look like d20:v5e-8, d34:v6e-256:model=2 or d20:v5e-8:replicate, got {text!r:.60}",
    )
    mesh = ",".join(part for part in more if part != "replicate")
    return Case(int(depth[1:]), slice_name, mesh, "replicate" in more)


def model_of_depth(depth: int, max_seq_len: int, vocab_size: int) -> GPTConfig:
    """nanochat's model of this depth."""
    return scaling_laws.config_of_depth(
        depth,
        aspect_ratio=64,
        head_dim=128,
        window_pattern=WINDOW_PATTERN,
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
    )


def slice_mesh(case: Case, model: GPTConfig) -> Mesh:
    """The mesh of the case's compile-only devices. ValueError: no such slice or mesh, or no TPU compiler is here."""
    return make_mesh(case.mesh, compile_only.devices(case.slice), model.n_embd)


def sft_plan(
    model: GPTConfig,
    mesh: Mesh,
    *,
    passes: int,
    rows: int,
    remat: str = "auto",
    attention: str = "auto",
    replicate: bool = False,
    dtype: str = "bfloat16",
) -> Plan:
    """The plan of an SFT run whose steps have `passes` passes of `rows` packed rows a chip, as long as the model's
    context. What the choices in it say goes to stderr."""
    cfg = sft.SFTConfig(
        max_seq_len=model.sequence_len,
        device_batch_size=rows,
        total_batch_size=passes * rows * row_shards(mesh) * model.sequence_len,
        embedding_lr=0.3,  # the rates do not matter: no size depends on them
        unembedding_lr=0.004,
        matrix_lr=0.02,
        remat=remat,
        attention=attention,
        replicate=replicate,
        dtype=dtype,
    )
    with contextlib.redirect_stdout(sys.stderr):
        plan = sft.plan_of(cfg, model, mesh)
    return plan
