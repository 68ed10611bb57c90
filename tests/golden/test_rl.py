"""nanochat's RL objective: its passes from raw rollouts, their losses and gradients, and one optimizer step."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.engine import Engine
from nanochat_jax.objective import Objective, advantages, make_score
from nanochat_jax.optim import Muon, default_groups, make_optimizer, rl_lr_multiplier, scale_rates
from nanochat_jax.rollouts import nanochat_rows, packed_rows
from nanochat_jax.samples import Sampling
from nanochat_jax.sharding import make_mesh, param_shardings, to_global
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import abstract_state, init_state, make_train_step, place
from tests.golden import data, models

RATES = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.0}  # nanochat's defaults
INIT_LR_FRAC, MUON_MOMENTUM = 0.05, 0.95


def cases() -> list[tuple[str, str]]:
    """(file, case) for every `<case>/losses_per_pass` in rl/."""
    found = []
    for file in data.names("rl"):
        keys = data.arrays(f"rl/{file}.npz") if file != "(none)" else ["(none)/losses_per_pass"]
        found += [(file, key.removesuffix("/losses_per_pass")) for key in keys if key.endswith("/losses_per_pass")]
    return found or [("(none)", "(none)")]


def case_of(file: str, case: str) -> tuple[dict, list[dict]]:
    """(the case's arrays, those of each of its examples)."""
    golden = models.under(f"{case}/", data.arrays(f"rl/{file}.npz"))
    return golden, [models.under(f"ex{i}/", golden) for i in range(int(golden["examples_per_rank"]))]


def rollout(sequence: np.ndarray, mask: np.ndarray) -> tuple[list[int], SimpleNamespace]:
    """A raw rollout as (prompt, sample). Where the prompt ends does not matter: the first token stands for it."""
    length = int((sequence >= 0).sum())
    return sequence[:1].tolist(), SimpleNamespace(tokens=sequence[1:length], mask=mask[1:length], ended=False)


@functools.cache
def passes(file: str, case: str) -> dict[str, np.ndarray]:
    golden, examples = case_of(file, case)
    groups = [
        [rollout(*pair) for pair in zip(example["sequences_minus1_padded"], example["masks_minus1_padded"])]
        for example in examples
    ]
    ends = np.unique(np.concatenate([example["inputs"].ravel() for example in examples]))  # any id pads
    return nanochat_rows(
        [group[0][0] for group in groups],
        [[sample for _, sample in group] for group in groups],
        np.stack([advantages(example["rewards"][None])[0] for example in examples]),
        max(example["inputs"].shape[1] for example in examples),
        pad=int(ends[-1]),
        rows=int(golden["device_batch_size"]),
    )


def keep_gradients() -> optax.GradientTransformationExtraArgs:
    """An optimizer that changes nothing and whose state is the last gradient."""

    def update(gradients, state, params=None, **_):
        return jax.tree.map(jnp.zeros_like, gradients), optax.TraceState(gradients)

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update
    )


@functools.cache
def step(file: str, case: str, optimizer: str):
    """-> (metrics, state) after one step of the shared train step on the case's passes."""
    config, params, _ = models.load(file)
    golden, _ = case_of(file, case)
    tx, multiplier = keep_gradients(), 1.0
    if optimizer == "nanochat's":
        tx = make_optimizer(scale_rates(default_groups(config.n_embd, **RATES), INIT_LR_FRAC))
        multiplier = rl_lr_multiplier(int(golden["optimizer_step/step"]), int(golden["optimizer_step/num_steps"]))
    mesh = make_mesh("data=1")
    with jax.set_mesh(mesh), models.rotary_tables_of(file):
        like = abstract_state(config, tx, mesh)
        train_step = make_train_step(config, tx, like, mesh, token_loss=Objective().token_loss, per_micro_batch=True)
        batch = to_global(passes(file, case), mesh)
        state, metrics = train_step(
            place(init_state(params, tx), like), batch, np.float32(multiplier), np.float32(MUON_MOMENTUM)
        )
    return jax.device_get(metrics), jax.device_get(state)


@pytest.mark.parametrize(("file", "case"), cases())
def test_the_passes_are_nanochats(file, case):
    golden, examples = case_of(file, case)
    batch = passes(file, case)
    per_example = int(golden["num_samples"]) // int(golden["device_batch_size"])
    for i, example in enumerate(examples):
        ours = {
            name: leaf[i * per_example : (i + 1) * per_example].reshape(int(golden["num_samples"]), -1)
            for name, leaf in batch.items()
        }
        t, trained = example["inputs"].shape[1], example["targets"] >= 0
        real = example["sequences_minus1_padded"][:, :t] >= 0
        np.testing.assert_array_equal(ours["inputs"][:, :t][real], example["inputs"][real])
        np.testing.assert_array_equal(ours["weights"][:, :t], trained)
        assert not ours["weights"][:, t:].any()
        np.testing.assert_array_equal(ours["targets"][:, :t][trained], example["targets"][trained])
        np.testing.assert_allclose(advantages(example["rewards"][None])[0], example["advantages"], atol=1e-6)


@pytest.mark.parametrize(("file", "case"), cases())
def test_the_losses_of_the_passes_are_nanochats(file, case):
    golden, _ = case_of(file, case)
    metrics, _ = step(file, case, "none")
    losses = metrics["micro_losses"] / len(metrics["micro_losses"])
    np.testing.assert_allclose(losses, golden["losses_per_pass"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], golden["losses_per_pass"].sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("file", "case"), cases())
def test_log_probabilities_are_nanochats(file, case):
    config, params, _ = models.load(file)
    golden, examples = case_of(file, case)
    mesh = make_mesh("data=1")
    with jax.set_mesh(mesh), models.rotary_tables_of(file):
        params = jax.device_put(params, param_shardings(params, mesh))
        logp = np.asarray(make_score(config, params, mesh)(params, to_global(passes(file, case), mesh)))
    logp = logp.reshape(len(examples), int(golden["num_samples"]), -1)
    for ours, example in zip(logp, examples):
        trained = example["targets"] >= 0
        np.testing.assert_allclose(ours[:, : trained.shape[1]][trained], example["logp"][trained], atol=1e-4)


@pytest.mark.parametrize(("file", "case"), cases())
def test_gradients_are_nanochats(file, case):
    golden, _ = case_of(file, case)
    gradients = models.by_name(step(file, case, "none")[1].opt_state.trace)
    for parameter, norm in zip(golden["param_names"].tolist(), golden["grad_norms"]):
        ours = np.linalg.norm(gradients[parameter].astype(np.float64))
        np.testing.assert_allclose(ours, norm, rtol=1e-3, atol=1e-9, err_msg=parameter)
    for parameter, gradient in models.under("grad/", golden).items():
        bound = 1e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(gradients[parameter], gradient, atol=bound, rtol=0, err_msg=parameter)


@pytest.mark.parametrize(("file", "case"), cases())
def test_the_optimizer_step_is_nanochats(file, case):
    golden, _ = case_of(file, case)
    expected = models.under("optimizer_step/", golden)
    if not expected:
        pytest.skip(f"rl/{file}.npz has no optimizer step for {case}")
    config, params, _ = models.load(file)
    before, after = models.by_name(params), models.by_name(step(file, case, "nanochat's")[1].params)
    groups = default_groups(config.n_embd, **RATES)
    assert isinstance(groups["matrix"], Muon) and not groups["matrix"].weight_decay  # no sign test: no element is off
    for parameter, weights in models.under("after/", expected).items():
        np.testing.assert_allclose(after[parameter], weights, atol=2e-6, rtol=0, err_msg=parameter)
    for parameter, norm in zip(golden["param_names"].tolist(), expected["update_norms"]):
        ours = np.linalg.norm(after[parameter].astype(np.float64) - before[parameter])
        rounding = np.finfo(np.float32).eps * np.linalg.norm(before[parameter].astype(np.float64))
        np.testing.assert_allclose(ours, norm, rtol=1e-4, atol=rounding, err_msg=parameter)


@pytest.mark.parametrize("file", data.names("rl"))
def test_in_bfloat16_neither_sampler_nor_trainer_is_much_farther_from_float32_than_the_other(file):
    """Random weights make the distance large, but it is rounding, the same on both sides: none rounds what the other
    does not."""
    config, params, _ = models.load(file)
    tokenizer = Tokenizer.load(data.path(f"checkpoints/{file}/tokenizer"))
    mesh, ids = make_mesh("data=1"), np.random.default_rng(0).integers(0, config.vocab_size, (8, 20))
    engine = Engine(config, tokenizer, mesh, dtype=jnp.bfloat16)
    engine.load(params)
    samples = engine.generate(ids, Sampling(top_k=0, max_new_tokens=24), samples=2)
    sizes = {"bos": tokenizer.bos, "micro_batches": 1, "rows": 16, "fields": ("policy_logprobs",)}
    batch = packed_rows(ids, samples, np.ones((8, 2), np.float32), 48, **sizes)
    sampled, drawn = batch["weights"] > 0, batch.pop("policy_logprobs")
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(params, mesh))
        exact, trained = (
            np.asarray(make_score(config, params, mesh, dtype=dtype)(params, to_global(batch, mesh)))[sampled]
            for dtype in (jnp.float32, jnp.bfloat16)
        )
    ours, theirs = (np.abs(logp - exact).mean() for logp in (drawn[sampled], trained))
    assert 0.5 < ours / theirs < 2 and theirs > 1e-5
