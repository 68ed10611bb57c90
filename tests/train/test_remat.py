"""Rematerialisation: the same gradients from less memory, and attention is not computed twice.

Run: python -m pytest tests/train/test_remat.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanochat_jax import sft
from nanochat_jax.cli import device as memory
from nanochat_jax.cli.settings import check_bounds
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.sharding import batch_sharding
from nanochat_jax.model.gpt import REMAT, abstract_gpt
from nanochat_jax.model.loss import summed_token_loss, weighted_nll
from nanochat_jax.optim.groups import default_groups, make_optimizer
from nanochat_jax.train.remat import choose_remat
from nanochat_jax.train.step import abstract_state, make_train_step
from tests.support.models import DESCENT, random_batch, random_params, tiny_config

SCALARS = (np.float32(1), np.float32(0.9))


def loss_of(config, params, batch, remat):
    """The loss of a batch [B,T] as the train step has it."""
    model = nnx.merge(abstract_gpt(config)[0], params)
    x, _ = model.hidden(batch["inputs"], document_start=batch["document_start"], remat=remat)
    head = {"cap": config.logit_cap, "vocab_size": config.vocab_size}
    return summed_token_loss(weighted_nll, x, params["lm_head"], batch["targets"], batch, **head)[0]


def example():
    config = tiny_config()
    return config, random_params(config), {k: jnp.asarray(v[0]) for k, v in random_batch(config, B=2).items()}


@functools.cache
def gradients(remat):
    config, params, batch = example()
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config), 0), static_argnums=2)(params, batch, remat)


@pytest.mark.parametrize("remat", REMAT[1:])
def test_gradients_are_those_of_a_pass_that_keeps_everything(remat):
    (loss, grads), (kept_loss, kept) = gradients(remat), gradients("none")
    np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), grads, kept)


def count(program, name):
    """Operations of this name in a jaxpr, inner ones included."""
    program = getattr(program, "jaxpr", program)
    total = 0
    for eqn in program.eqns:
        inner = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else [value])]
        total += (eqn.primitive.name == name) + sum(
            count(x, name) for x in inner if hasattr(x, "jaxpr") or hasattr(x, "eqns")
        )
    return total


@pytest.mark.parametrize("remat", REMAT[1:])
def test_attention_runs_once_a_layer_whatever_is_computed_again(remat):
    config, params, batch = example()

    def logarithms(remat):  # the log-sum-exp of attention has one, and the loss
        grad = jax.grad(functools.partial(loss_of, config, batch=batch, remat=remat))
        return count(jax.make_jaxpr(grad)(params), "log")

    assert logarithms(remat) == logarithms("none") > config.n_layer


@functools.cache
def temporaries(remat):
    """Bytes that a train step needs beside its arguments."""
    config = tiny_config(n_layer=4, windows=(-1,) * 4, n_embd=128, sequence_len=256)
    mesh = make_mesh("data=1")
    state = abstract_state(config, DESCENT, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
        for name, leaf in random_batch(config, B=8, T=256).items()
    }
    with jax.set_mesh(mesh):
        step = make_train_step(config, DESCENT, state, mesh, remat=remat)
        return step.lower(state, batch, *SCALARS).compile().memory_analysis().temp_size_in_bytes


def test_memory_falls_to_two_thirds_and_to_half():
    assert temporaries("elementwise") < 0.67 * temporaries("none")
    assert temporaries("block") < 0.5 * temporaries("none")
    assert temporaries("block") < 0.75 * temporaries("elementwise")  # which keeps products


def test_auto_keeps_what_fits_and_computes_again_what_does_not():
    mesh = make_mesh("data=1")
    config = tiny_config()
    tx = make_optimizer(default_groups(64, embedding_lr=0.1, unembedding_lr=0.004, matrix_lr=0.02))
    state = abstract_state(config, tx, mesh)

    def chosen(wanted, rows):
        return choose_remat(wanted, config, state, jnp.float32, rows, T=1024)

    assert chosen("auto", 1).name == "none" and "--device-batch-size" not in chosen("auto", 1).why
    assert chosen("auto", 1 << 30).name == "block" and "--device-batch-size" not in chosen("auto", 1 << 30).why
    assert chosen("elementwise", 1 << 30).name == "elementwise"
    most = 1  # the power of two of which twice as much does not fit
    while chosen("auto", 2 * most).name == "none":
        most *= 2
    for rows in (2 * most, 4 * most):
        assert f"with --device-batch-size={most} nothing would be computed again" in chosen("auto", rows).why
    assert "--device-batch-size" not in chosen("auto", 8 * most).why


@pytest.mark.parametrize(
    ("platform", "set_to", "offered", "said"),
    [
        ("cpu", "", "always [madvise] never", True),
        ("cpu", "glibc.malloc.check=1", "always [madvise] never", True),
        ("cpu", "glibc.malloc.hugetlb=1", "always [madvise] never", False),
        ("cpu", "", "[always] madvise never", False),
        ("cpu", "", "always madvise [never]", False),
        ("cpu", "", None, False),
        ("tpu", "", "always [madvise] never", False),
    ],
)
def test_a_cpu_that_could_have_large_pages_is_told_of(monkeypatch, tmp_path, platform, set_to, offered, said):
    monkeypatch.setattr(memory, "LARGE_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", set_to)
    if offered:
        memory.LARGE_PAGES.write_text(offered + "\n")
    assert ["glibc.malloc.hugetlb=1" in note for note in memory.pages_note(platform)] == [True] * said


def test_an_unknown_name_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="--remat must be auto, none, elementwise or block, got all"):
        check_bounds(sft.SFTConfig(remat="all"))
