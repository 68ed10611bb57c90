"""Meshes of 8 devices: the same training and the same answers as on one, for RL; and what is told of the sharding.
SFT's train step on the same meshes, and what it sends: test_train.py.

Run: python -m pytest tests/distributed/test_meshes.py
"""

import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import rl
from nanochat_jax.cli.command_line import parse
from nanochat_jax.distributed.describe import heads_note, parameter_table, replicas_note
from nanochat_jax.distributed.device_memory import bytes_on_device
from nanochat_jax.distributed.mesh import make_mesh, own_devices, row_part
from nanochat_jax.distributed.sharding import own_copy, param_shardings
from nanochat_jax.optim import groups
from nanochat_jax.train import step
from nanochat_jax.train.metrics import read_metrics
from tests.support import tiny
from tests.support.models import random_params

MESHES = {
    "alone": ["data=1"],
    "data": ["data=8", "--replicate"],
    "fsdp": ["data=8"],
    "fsdp x tensor": ["data=4,model=2"],
    "replicas": ["replica=2,data=4"],
}
STEPS = 10


@pytest.fixture(scope="module")
def rl_runs(base):
    """mesh -> (losses by step, rewards by step, rollouts) of 10 steps of RL."""
    done = {}
    flags = [
        "--source",
        "base",
        "--task",
        "tests.support.process_tasks:Vowels",
        "--num-steps",
        str(STEPS),
        "--eval-every",
        "-1",
    ]
    flags += [
        "--examples-per-step",
        "4",
        "--num-samples",
        "4",
        "--max-new-tokens",
        "16",
        "--log-rollouts",
        "4",
        "--cut-answers",
        "keep",
    ]

    def get(name):
        if name not in done:
            tag, rows = name.replace(" ", "-"), {"alone": "8", "fsdp x tensor": "2"}.get(name, "1")
            more = ["--mesh", *MESHES[name], "--device-batch-size", rows, "--output-tag", tag]
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
                patch.setenv("NANOCHAT_BASE_DIR", str(base))
                assert rl.main(parse(rl.RLConfig, [*flags, *more])) == 0
            folder = base / "chatrl_checkpoints" / tag
            records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
            rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
            done[name] = [r["loss"] for r in records], [r["reward"] for r in records], rollouts
        return done[name]

    return get


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "alone"])
def test_rl_draws_the_same_answers_and_learns_the_same_on_every_mesh(rl_runs, mesh):
    alone, other = rl_runs("alone"), rl_runs(mesh)
    assert len(other[0]) == STEPS and len(other[2]) == STEPS * 16
    np.testing.assert_allclose(other[0], alone[0], rtol=1e-5, atol=1e-6)
    assert other[1] == alone[1]
    for name in ("tokens", "mask", "text", "reward", "advantage", "ended"):
        assert [sample[name] for sample in other[2]] == [sample[name] for sample in alone[2]]


def abstract(mesh, model=tiny.CONFIG, replicate=False):
    rates = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}
    tx = groups.make_optimizer(groups.default_groups(model.n_embd, **rates))
    return tx, step.abstract_state(model, tx, mesh, replicate)


def test_the_table_tells_how_parameters_are_split_and_what_does_not_divide():
    mesh = make_mesh("data=4,model=2")
    lines, notes = parameter_table(abstract(mesh)[1].params, mesh)
    (row,) = [line.split() for line in lines if line.startswith("blocks/*/attn/c_q")]
    assert row == ["blocks/*/attn/c_q", "x", "2", "64", "x", "64", "(model,", "data)", f"{2 * 4 * 64 * 64 // 8:,}"]
    assert notes == []
    assert int(lines[-1].split()[-1].replace(",", "")) == sum(
        leaf.dtype.itemsize * np.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract(mesh)[1].params)
    )
    odd = dataclasses.replace(tiny.CONFIG, n_embd=60, n_head=3, n_kv_head=3)
    mesh = make_mesh("data=8")
    lines, notes = parameter_table(abstract(mesh, odd)[1].params, mesh)
    said = "60 is no multiple of the mesh's data=8, so"
    named = {how: names.split(", ") for how, names in (note.split(": ") for note in notes)}
    moved, whole = named.pop(f"{said} split along the other side"), named.pop(f"{said} not split")
    assert not named
    assert "wte" in moved and "blocks/*/mlp/c_fc" in moved
    assert "blocks/*/attn/c_q" in whole and not any("lambda" in name for name in moved + whole)
    assert parameter_table(abstract(mesh, odd, True)[1].params, mesh, True)[1] == []  # whole copies were wanted


def test_heads_that_the_model_axis_does_not_divide_are_told_of():
    assert heads_note(4, make_mesh("data=4,model=2")) == []
    (note,) = heads_note(17, make_mesh("data=4,model=2"))
    assert note == "17 kv heads are no multiple of the mesh's model=2, so attention is computed 2 times"


def test_replicas_that_nobody_asked_for_are_told_of():
    (note,) = replicas_note(60, make_mesh("", n_embd=60))
    assert note.startswith("parameters are split over 4 devices and kept 2 times (--mesh replica=2,data=4)")
    assert replicas_note(64, make_mesh("", n_embd=64)) == []


def test_a_process_holds_whole_rows_of_a_batch():
    mesh = make_mesh("data=4,model=2")
    assert row_part(mesh) == (0, 1)
    assert own_devices(mesh) is mesh and own_copy({"a": 1}, mesh, jnp.float32) == {"a": 1}


def test_the_copy_of_a_process_has_its_matrices_in_the_compute_type(monkeypatch):
    """And the values that the model would round them to; with all devices in one process, as if there were another."""
    mesh = make_mesh("data=4,model=2")
    params = random_params(tiny.CONFIG)
    placed = jax.device_put(params, param_shardings(params, mesh))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    copy = own_copy(placed, mesh, jnp.bfloat16)
    for ours, theirs in zip(jax.tree.leaves(copy), jax.tree.leaves(params), strict=True):
        expected = np.asarray(theirs).astype(jnp.bfloat16) if theirs.ndim > 1 else np.asarray(theirs)
        np.testing.assert_array_equal(np.asarray(ours), expected)
        assert ours.dtype == expected.dtype
    assert bytes_on_device(copy) < 0.51 * bytes_on_device(placed)
