"""Three steps of nanochat's optimizer from a checkpoint's weights: weights, state and the table of groups."""

import functools

import jax
import numpy as np
import optax
import pytest

from nanochat_jax.optim.groups import AdamW, Muon, default_groups, group_labels, make_optimizer, state_arrays
from nanochat_jax.optim.muon import POLAR_EXPRESS
from tests.golden import data, models

STEPS = (1, 2, 3)
MUON_ATOL, FLIPPED = 2e-6, 1e-4  # of Muon's weights, this share may be off by a flipped sign test: OPTIMIZER.md


def table(name: str) -> dict:
    return data.load_json(f"optim/{name}_groups.json")


def groups_of(name: str, **changes):
    """Our groups from the arguments that nanochat's were made with."""
    config, _, _ = models.load(name)
    return default_groups(config.n_embd, **(table(name)["setup_arguments"] | changes))


def gradients(name: str, step: int) -> dict:
    if step == 1:
        return models.under("grad/", data.arrays(f"grads/{name}.npz"))
    golden = data.arrays(f"optim/{name}.npz")
    scale = np.float32(golden[f"grad{step}_scale"])
    return {p: g.astype(np.float32) * scale for p, g in models.under(f"grad{step}_int8/", golden).items()}


@functools.cache
def trained(name: str, **changes):
    """-> (weights before the first and after each step, by nanochat's names; the optimizer's state at the end)."""
    _, params, _ = models.load(name)
    tx, record = make_optimizer(groups_of(name, **changes)), table(name)

    @jax.jit
    def update(params, state, grads, multiplier, momentum):
        updates, state = tx.update(grads, state, params, lr_multiplier=multiplier, muon_momentum=momentum)
        return optax.apply_updates(params, updates), state

    weights, state = [models.by_name(params)], tx.init(params)
    for step in STEPS:
        scheduled = (record[f"{key}_per_step"][step - 1] for key in ("lr_multiplier", "muon_momentum"))
        params, state = update(params, state, models.tree(gradients(name, step)), *map(np.float32, scheduled))
        weights.append(models.by_name(params))
    return weights, state_arrays(state)


def muon_parameters(name: str) -> set[str]:
    return {p for group in table(name)["groups_after_step_3"] if group["kind"] == "muon" for p in group["params"]}


def flip_bound(name: str, parameter: str, weights: list, step: int) -> np.ndarray:
    """What weight decay alone may have moved each element by: the sum over the steps of L wd |p|."""
    group, (r, c) = groups_of(name)["matrix"], weights[0][parameter].shape
    L = [group.lr * max(1, r / c) ** 0.5 * m for m in table(name)["lr_multiplier_per_step"]]
    return sum(L[s] * group.weight_decay * np.abs(weights[s][parameter]) for s in range(step))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", data.names("optim"))
def test_weights_after_each_step_are_nanochats(name, step):
    expected = models.under(f"after{step}/", data.arrays(f"optim/{name}.npz"))
    if not expected:
        pytest.skip(f"optim/{name}.npz has no weights after step {step}")
    weights, _ = trained(name)
    muon, off, size = muon_parameters(name), 0, 0
    for parameter, golden in expected.items():
        difference = np.abs(weights[step][parameter] - golden)
        if parameter not in muon:
            rounding = np.finfo(np.float32).eps * np.abs(golden)  # three steps round a weight above 4 by up to 1e-6
            np.testing.assert_array_less(difference, 1e-6 + rounding, err_msg=parameter)
            continue
        bound = MUON_ATOL + flip_bound(name, parameter, weights, step)
        np.testing.assert_array_less(difference, bound, err_msg=parameter)
        off, size = off + (difference > MUON_ATOL).sum(), size + difference.size
    assert off <= FLIPPED * size


@pytest.mark.parametrize("name", data.names("optim"))
def test_without_weight_decay_no_weight_is_off(name):
    expected = models.under("wd0_after3/", data.arrays(f"optim/{name}.npz"))
    weights, _ = trained(name, weight_decay=0.0)
    for parameter, golden in expected.items():
        np.testing.assert_allclose(weights[3][parameter], golden, atol=MUON_ATOL, rtol=0, err_msg=parameter)


@pytest.mark.parametrize("name", data.names("optim"))
def test_sums_over_every_parameter_are_nanochats(name):
    """Sum, sum of absolute values, sum of squares: also of the matrices whose elements the file does not hold.

    Rounding errors partly cancel in a sum, so it is held to a tenth of what the elements' tolerance would allow, plus
    what the share of flipped signs may move.
    """
    weights, _ = trained(name)
    muon, expected = muon_parameters(name), models.under("after3_sum/", data.arrays(f"optim/{name}.npz"))
    assert expected.keys() == weights[3].keys()
    for parameter, golden in expected.items():
        p = weights[3][parameter].astype(np.float64)
        slack = 1e-6 * max(1, p.size / 10)
        if parameter in muon:
            slack += max(1, FLIPPED * p.size) * flip_bound(name, parameter, weights, 3).max()
        ours = [p.sum(), np.abs(p).sum(), (p * p).sum()]
        for got, want, factor in zip(ours, golden, (1, 1, 2 * max(1, np.abs(p).max()))):
            assert abs(got - want) <= slack * factor, (parameter, got, want)


@pytest.mark.parametrize("name", data.names("optim"))
def test_updates_have_nanochats_norms(name):
    golden, (weights, _) = data.arrays(f"optim/{name}.npz"), trained(name)
    for step in STEPS:
        for parameter, norm in zip(golden["param_names"].tolist(), golden[f"update_norm{step}"]):
            before = weights[step - 1][parameter].astype(np.float64)
            rounding = np.finfo(np.float32).eps * np.linalg.norm(before)  # of weights that are far larger than updates
            ours, where = np.linalg.norm(weights[step][parameter] - before), f"{parameter}, step {step}"
            np.testing.assert_allclose(ours, norm, rtol=1e-5, atol=rounding, err_msg=where)


@pytest.mark.parametrize("name", data.names("optim"))
def test_the_state_after_three_steps_is_nanochats(name):
    """Files keep a Muon group's buffers stacked, and of the first momentum buffer its first rows."""
    expected = models.under("state3/group", data.arrays(f"optim/{name}.npz"))
    _, state = trained(name)
    state = {key: np.asarray(array) for key, array in state.items()}
    ours = {}
    for kind in ("exp_avg", "exp_avg_sq", "momentum", "second_momentum"):
        ours[kind] = {models.nanochat_name(path): array for path, array in models.under(f"{kind}/", state).items()}
    assert all(count == len(STEPS) for count in models.under("count/", state).values())
    for key, golden in expected.items():
        index, *member, kind = key.split("/")
        members = table(name)["groups_after_step_3"][int(index)]["params"]
        if member:
            got = ours[kind][members[int(member[0])]]
        elif kind == "second_momentum_buffer":
            got = np.stack([ours["second_momentum"][p] for p in members])
        elif kind == "momentum_buffer_norms":
            got = np.array([np.linalg.norm(ours["momentum"][p]) for p in members])
        else:
            got = ours["momentum"][members[0]][: len(golden)]
        assert got.shape == golden.shape, key
        np.testing.assert_allclose(got, golden, rtol=1e-5, atol=1e-6 * np.abs(golden).max(), err_msg=key)


@pytest.mark.parametrize("name", data.names("optim"))
def test_the_table_of_groups_is_nanochats(name):
    record, ours = table(name), groups_of(name)
    labels = models.by_name(group_labels(models.load(name)[1]))
    multiplier, momentum = (record[f"{key}_per_step"][-1] for key in ("lr_multiplier", "muon_momentum"))
    for golden in record["groups_after_step_3"]:
        (label,) = {str(labels.pop(parameter)) for parameter in golden["params"]}
        group = ours[label]
        assert isinstance(group, {"adamw": AdamW, "muon": Muon}[golden["kind"]])
        np.testing.assert_allclose(group.lr, golden["initial_lr"], rtol=1e-12)
        np.testing.assert_allclose(group.lr * multiplier, golden["lr"], rtol=1e-12)
        assert group.weight_decay == golden["weight_decay"]
        if isinstance(group, AdamW):
            assert ([group.b1, group.b2], group.eps) == (golden["betas"], golden["eps"])
        else:
            assert (group.b2, len(POLAR_EXPRESS), momentum) == (golden["beta2"], golden["ns_steps"], golden["momentum"])
    assert not labels, "every parameter is in one group"
