"""The network of every era against what nanochat computed: logits, losses, gradients. Decoding: test_engine.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.loss import summed_token_loss, token_logprobs, weighted_nll
from tests.golden import data, models

# Most of the time goes into compiling many small programs, each to be run once or a few times.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def inputs() -> list[tuple[str, str]]:
    """(file, input) for every `<input>_ids` in forward/."""
    found = []
    for file in data.names("forward"):
        keys = data.arrays(f"forward/{file}.npz") if file != "(none)" else ["(none)_ids"]
        found += [(file, key.removesuffix("_ids")) for key in keys if key.endswith("_ids")]
    return found


@functools.cache
def forward(file: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """input -> (logits, log p of each target). All inputs of a file are rows of one batch, which is compiled once: what
    fills them up at the end is seen by nothing before it."""
    config, params, _ = models.load(models.of_file(file))
    golden = data.arrays(f"forward/{file}.npz")
    names = [input for name, input in inputs() if name == file]
    shapes = [golden[f"{input}_ids"].shape for input in names]
    T = max(T for _, T in shapes)

    def rows(kind):
        return np.concatenate([np.pad(golden[f"{i}_{kind}"], ((0, 0), (0, T - n))) for i, (_, n) in zip(names, shapes)])

    @quick_jit
    def run(params, ids, targets):
        model = models.built(config, params)
        with models.rotary_tables_of(file):
            x, _ = model.hidden(ids)
        head = {"cap": config.logit_cap, "vocab_size": config.vocab_size}
        return model.logits(x), token_logprobs(x, params["lm_head"], targets, **head)

    found = jax.device_get(run(params, rows("ids"), np.maximum(rows("targets"), 0)))
    first = np.cumsum([0] + [B for B, _ in shapes])
    return {i: tuple(x[n : n + B, :T] for x in found) for i, n, (B, T) in zip(names, first, shapes)}


@pytest.mark.parametrize(("file", "input"), inputs())
def test_logits_and_losses_are_nanochats(file, input):
    golden = models.under(f"{input}_", data.arrays(f"forward/{file}.npz"))
    targets = golden["targets"]
    logits, logp = forward(file)[input]
    losses = np.where(targets >= 0, -logp, 0)
    np.testing.assert_allclose(logits[:, golden["positions"]], golden["logits"], atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(losses, golden["loss_per_token"], atol=1e-4, rtol=0)
    total = losses.sum(dtype=np.float64)
    np.testing.assert_allclose(total, golden["loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(total / (targets >= 0).sum(), golden["loss_mean"], rtol=1e-5)


@pytest.mark.parametrize("name", data.names("grads"))
def test_gradients_of_every_parameter_are_nanochats(name):
    golden = data.arrays(f"grads/{name}.npz")
    config, params, _ = models.load(name)
    batch = data.arrays(f"forward/{name}.npz")
    ids, targets = batch["t1_ids"], batch["t1_targets"]
    weights = jnp.asarray(targets >= 0, jnp.float32) / (targets >= 0).sum()

    @quick_jit
    def loss_and_gradients(params):
        def loss(params):
            with models.rotary_tables_of(name):
                x, _ = models.built(config, params).hidden(ids)
            head = {"cap": config.logit_cap, "vocab_size": config.vocab_size}
            aux = {"weights": weights}
            return summed_token_loss(weighted_nll, x, params["lm_head"], np.maximum(targets, 0), aux, **head)[0]

        return jax.value_and_grad(loss)(params)

    loss, gradients = loss_and_gradients(params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    ours, expected = models.by_name(gradients), models.under("grad/", golden)
    assert expected.keys() <= ours.keys()
    for parameter, gradient in expected.items():
        bound = 1e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(ours[parameter], gradient, atol=bound, rtol=0, err_msg=parameter)
