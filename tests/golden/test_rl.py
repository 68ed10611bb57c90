"""nanochat's RL objective: its passes from raw rollouts, their losses and gradients, and one optimizer step."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.sharding import param_shardings, to_global
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.optim.groups import Muon, default_groups, make_optimizer, scale_rates
from nanochat_jax.optim.schedules import rl_lr_multiplier
from nanochat_jax.rollouts.objective import Objective, advantages, make_score
from nanochat_jax.rollouts.pack import nanochat_rows, packed_rows
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.step import abstract_state, init_state, make_train_step, place
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


@functools.cache
def largest(file: str) -> tuple[int, int, int]:
    """(passes, rows, tokens) that hold those of every case of the file."""
    return tuple(np.max([passes(file, case)["weights"].shape for other, case in cases() if other == file], 0).tolist())


def same_shape(file: str, case: str, alone: bool = True) -> dict[str, np.ndarray]:
    """The case's passes in the shape of the file's largest, so that few programs are compiled: filled up with rows and
    columns without weight, and repeated, which leaves the mean over them as it is. alone: one pass stays one."""
    batch, (most, rows, T) = passes(file, case), largest(file)
    A, B, t = batch["weights"].shape
    times = 1 if most % A or (alone and A == 1) else most // A
    filled = {name: np.pad(leaf, [(0, 0), (0, rows - B), (0, T - t)]) for name, leaf in batch.items()}
    return {name: np.tile(leaf, (times, 1, 1)) for name, leaf in filled.items()}


def keep_gradients() -> optax.GradientTransformationExtraArgs:
    """Hands gradients on as they are; its state is the last ones."""

    def update(gradients, state, params=None, **_):
        return gradients, optax.TraceState(gradients)

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update
    )


@functools.cache
def program(file: str, count: int):
    """(the shared train step for batches of so many passes, its first state). The optimizer is nanochat's where the
    file has its step for such a batch, else it changes nothing."""
    config, params, _ = models.load(file)
    alike = [case for other, case in cases() if other == file and len(same_shape(file, case)["weights"]) == count]
    optimizer = optax.set_to_zero()
    if any("optimizer_step/step" in case_of(file, case)[0] for case in alike):
        optimizer = make_optimizer(scale_rates(default_groups(config.n_embd, **RATES), INIT_LR_FRAC))
    tx, mesh = optax.chain(keep_gradients(), optimizer), make_mesh("data=1")
    like = abstract_state(config, tx, mesh)
    how = {"token_loss": Objective().token_loss, "per_micro_batch": True}
    return make_train_step(config, tx, like, mesh, **how), functools.partial(place, init_state(params, tx), like)


@functools.cache
def step(file: str, case: str):
    """-> (metrics, state) after one step of the shared train step on the case's passes."""
    golden, _ = case_of(file, case)
    multiplier = 1.0
    if "optimizer_step/step" in golden:
        multiplier = rl_lr_multiplier(int(golden["optimizer_step/step"]), int(golden["optimizer_step/num_steps"]))
    batch, mesh = same_shape(file, case), make_mesh("data=1")
    with jax.set_mesh(mesh), models.rotary_tables_of(file):
        train_step, first = program(file, len(batch["weights"]))
        scalars = np.float32(multiplier), np.float32(MUON_MOMENTUM)
        state, metrics = train_step(first(), to_global(batch, mesh), *scalars)
    return jax.device_get(metrics), jax.device_get(state)


@functools.cache
def scored(file: str):
    """(parameters on the device, what scores batches with them)."""
    config, params, _ = models.load(file)
    mesh = make_mesh("data=1")
    params = jax.device_put(params, param_shardings(params, mesh))
    return params, make_score(config, params, mesh)


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
    metrics, _ = step(file, case)
    count = len(golden["losses_per_pass"])
    times = len(metrics.micro_losses) // count  # that `same_shape` has repeated the passes
    losses = metrics.micro_losses / count
    np.testing.assert_allclose(losses, np.tile(golden["losses_per_pass"], times), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics.loss, golden["losses_per_pass"].sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("file", "case"), cases())
def test_log_probabilities_are_nanochats(file, case):
    golden, examples = case_of(file, case)
    A, B, T = passes(file, case)["weights"].shape
    mesh = make_mesh("data=1")
    with jax.set_mesh(mesh), models.rotary_tables_of(file):
        params, score = scored(file)
        logp = np.asarray(score(params, to_global(same_shape(file, case, alone=False), mesh)))
    logp = logp[:A, :B, :T].reshape(len(examples), int(golden["num_samples"]), -1)
    for ours, example in zip(logp, examples):
        trained = example["targets"] >= 0
        np.testing.assert_allclose(ours[:, : trained.shape[1]][trained], example["logp"][trained], atol=1e-4)


@pytest.mark.parametrize(("file", "case"), cases())
def test_gradients_are_nanochats(file, case):
    golden, _ = case_of(file, case)
    gradients = models.by_name(step(file, case)[1].opt_state[0].trace)
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
    before, after = models.by_name(params), models.by_name(step(file, case)[1].params)
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
    samples = engine.generate(params, ids, SamplingParams(top_k=0, max_new_tokens=24), samples=2)
    A, B, T = largest(file)  # the shape for which the program that scores in float32 is there already
    sizes = {"bos": tokenizer.bos, "micro_batches": A, "rows": B, "fields": ("policy_logprobs",)}
    batch = packed_rows(ids, samples, np.ones((8, 2), np.float32), T, **sizes)
    sampled, drawn = batch["weights"] > 0, batch.pop("policy_logprobs")
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(params, mesh))
        exact, trained = (
            np.asarray(make_score(config, params, mesh, dtype=dtype)(params, to_global(batch, mesh)))[sampled]
            for dtype in (jnp.float32, jnp.bfloat16)
        )
    ours, theirs = (np.abs(logp - exact).mean() for logp in (drawn[sampled], trained))
    assert 0.5 < ours / theirs < 2 and theirs > 1e-5
