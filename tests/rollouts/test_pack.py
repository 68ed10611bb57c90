"""Samples become rows: every sampled token once, with its own numbers, and the layout changes no result."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data.packing import plan_epoch
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.rollouts.objective import Objective, advantages, make_score
from nanochat_jax.rollouts.pack import most_rows, nanochat_rows, packed_rows
from nanochat_jax.rollouts.statistics import step_statistics
from nanochat_jax.train.step import abstract_state, init_state, make_train_step, place
from tests.support.models import DESCENT, random_params, tiny_config

BOS, END = 0, 1


@dataclasses.dataclass
class Sample:
    """What `samples.Sample` holds."""

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    ended: bool
    tool_calls: list = dataclasses.field(default_factory=list)
    turns: int = 1


@dataclasses.dataclass
class Call:
    expression: str
    result: str | None
    timed_out: bool = False


def sample(tokens, mask=None, ended=True, logprobs=None, calls=()):
    mask = np.ones(len(tokens), np.uint8) if mask is None else np.asarray(mask, np.uint8)
    logprobs = -np.arange(1, len(tokens) + 1) if logprobs is None else logprobs
    return Sample(np.array(tokens, np.int32), mask, np.float32(logprobs * mask), ended, list(calls))


def draw(P=3, G=4, longest=12, vocab=90, seed=0):
    """Prompts, samples with forced tokens among them, and rewards of which the last group's are equal."""
    rng = np.random.default_rng(seed)

    def one():
        n = rng.integers(1, longest + 1)
        mask = np.append(rng.random(n - 1) < 0.8, True)
        return sample(rng.integers(2, vocab, n), mask, bool(rng.random() < 0.7), -rng.random(n))

    prompts = [[BOS, *rng.integers(2, vocab, rng.integers(1, 8)).tolist()] for _ in range(P)]
    rewards = rng.integers(0, 2, (P, G)).astype(float)
    rewards[:, 0], rewards[:, -1], rewards[-1] = 0, 1, 1
    return prompts, [[one() for _ in range(G)] for _ in range(P)], rewards


def test_a_small_step_is_laid_out_like_this():
    prompts = [[BOS, 5], [BOS, 6, 7]]
    samples = [[sample([8, 9, END], [1, 0, 1]), sample([4], ended=False)], [sample([3, END]), sample([2, END])]]
    batch = packed_rows(
        prompts, samples, [[0.5, -0.5], [0, 0]], 7, bos=BOS, micro_batches=2, rows=1, fields=["logprobs"]
    )
    assert {leaf.shape for leaf in batch.values()} == {(2, 1, 7)}
    first = {name: leaf[0, 0].tolist() for name, leaf in batch.items()}
    assert first["inputs"] == [BOS, 5, 8, 9, END, BOS, 5]
    assert first["targets"] == [5, 8, 9, END, BOS, 5, 4]
    assert first["weights"] == [0, 1, 0, 1, 0, 0, 1]  # 9 was forced
    assert first["document_start"] == [0, 0, 0, 0, 0, 5, 5]
    assert first["logprobs"] == [0, -1, 0, -3, 0, 0, -1]
    kept = 3 / 7  # of the step's 7 sampled tokens 3 are in the rows
    np.testing.assert_allclose(first["advantages"], np.array([0, 0.5, 0.5, 0.5, 0, 0, -0.5]) * kept, rtol=1e-6)
    assert not batch["weights"][1].any() and (batch["inputs"][1] == BOS).all()


def test_nanochats_rows_are_not_packed_and_do_not_train_the_end():
    samples = [[sample([8, 9, END], [1, 0, 1]), sample([4, 3], ended=False)]]
    batch = nanochat_rows([[BOS, 5]], samples, [[0.5, -0.5]], 5, pad=END, rows=2)
    assert batch["inputs"][0].tolist() == [[BOS, 5, 8, 9, END], [BOS, 5, 4, 3, END]]
    assert batch["weights"][0].tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert batch["targets"][0, 1, :3].tolist() == [5, 4, 3]
    assert batch["advantages"][0, :, 1].tolist() == [0.5, -0.5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(20, 60), st.integers(1, 3))
def test_every_sampled_token_is_there_once_with_its_own_numbers(seed, P, G, T, B):
    prompts, samples, _ = draw(P, G, seed=seed)
    given_advantages = np.random.default_rng(seed).standard_normal((P, G)).astype(np.float32)
    A = -(-most_rows(P * G, 20, T) // B)
    batch = packed_rows(
        prompts, samples, given_advantages, T, bos=BOS, micro_batches=A, rows=B, fields=["logprobs"], every_group=True
    )
    flat = {name: leaf.reshape(-1, T) for name, leaf in batch.items()}
    found = []
    for r, start in zip(*np.nonzero(flat["document_start"] == np.arange(T))):
        t = np.flatnonzero((flat["document_start"][r] == start) & (flat["weights"][r] > 0))
        if len(t):
            seen = [*flat["inputs"][r, start : t[-1] + 1].tolist(), int(flat["targets"][r, t[-1]])]
            numbers = [flat[name][r, t].tolist() for name in ("logprobs", "advantages")]
            found.append((seen, (t - start).tolist(), *numbers))
    expected = []
    for p, prompt in enumerate(prompts):
        for g, s in enumerate(samples[p]):
            sampled = np.flatnonzero(s.mask)  # the last is sampled
            numbers = [s.logprobs[sampled].tolist(), [given_advantages[p, g]] * len(sampled)]
            expected.append((prompt + s.tokens.tolist(), (sampled + len(prompt) - 1).tolist(), *numbers))
    assert sorted(found) == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(29, 90))
def test_the_number_of_rows_always_suffices(lengths, T):
    plan = plan_epoch(np.array(lengths), np.arange(len(lengths)), T + 1, len(lengths))
    assert plan.n_rows <= most_rows(len(lengths), 30, T)


def test_a_step_without_any_signal_is_padding():
    prompts, samples, _ = draw()
    batch = packed_rows(prompts, samples, np.zeros((3, 4)), 30, bos=BOS, micro_batches=1, rows=2)
    assert not batch["weights"].any() and not batch["advantages"].any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"T": 5}, "must fit into a row of 5"),
        ({"micro_batches": 1, "rows": 1}, "rows of 30 tokens, which must fit into 1 micro-batches of 1 rows"),
        ({"advantages": np.ones((3, 3))}, "every group must have 3 samples"),
        ({"advantages": np.ones((2, 4))}, r"need advantages \[P,G\]"),
        ({"prompts": [[BOS]]}, r"1 prompts and 3 groups"),
    ],
)
def test_samples_that_cannot_be_laid_out_are_refused(changes, match):
    prompts, samples, rewards = draw()
    given_values = {"prompts": prompts, "samples": samples, "advantages": advantages(rewards), "T": 30}
    with pytest.raises(ValueError, match=match):
        packed_rows(**(given_values | {"bos": BOS, "micro_batches": 8, "rows": 2} | changes))


def test_passes_of_a_group_must_be_whole():
    prompts, samples, rewards = draw()
    with pytest.raises(ValueError, match="--num-samples must be a multiple of the 3 rows"):
        nanochat_rows(prompts, samples, advantages(rewards), 30, pad=END, rows=3)


def test_what_a_step_shows():
    failed, right = Call("1/0", None, True), Call("1+1", "2")
    samples = [
        [sample([5, END], logprobs=np.array([-1, -3])), sample([5, 6, 7, 8], [1, 0, 0, 1], ended=False, calls=[right])],
        [sample([END], logprobs=np.array([-2])), sample([5, END], calls=[right, failed], logprobs=np.array([0, 0]))],
    ]
    rewards = np.array([[1, 0], [0.5, 0.5]])
    assert step_statistics(samples, rewards, advantages(rewards)) == {
        "reward": 0.5,
        "pass_rate": 0.75,
        "no_signal": 0.5,
        "length_mean": 2.25,
        "length_max": 4,
        "cut": 0.25,
        "turns": 1.0,
        "tool_calls": 0.5,
        "tool_failed": 0.25,
        "tool_timeouts": 0.25,
        "entropy": pytest.approx((1 + 3 + 1 + 4 + 2) / 7),
    }


# The numbers that a step gives, whatever the layout

CONFIG = tiny_config(n_layer=2, windows=(7, -1))
T = 40


@functools.cache
def build(spec):
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        like = abstract_state(CONFIG, DESCENT, mesh)
        return mesh, like, make_train_step(CONFIG, DESCENT, like, mesh, token_loss=Objective().token_loss)


def train(batch, spec="data=1"):
    """(loss, gradient norm) of one step."""
    mesh, like, step = build(spec)
    with jax.set_mesh(mesh):
        state = place(init_state(random_params(CONFIG), DESCENT), like)
        _, metrics = step(state, to_global(batch, mesh), np.float32(1), np.float32(0.95))
    return float(metrics.loss), float(metrics.grad_norm)


@functools.cache
def plain_loss():
    """- sum of advantage * log p / number of sampled tokens, each sample alone in its row."""
    prompts, samples, rewards = draw()
    whole = [[dataclasses.replace(s, ended=False) for s in group] for group in samples]  # with its end token
    alone = nanochat_rows(prompts, whole, advantages(rewards), T, pad=END, rows=4)
    mesh, params = make_mesh("data=1"), random_params(CONFIG)
    with jax.set_mesh(mesh):
        logp = np.asarray(make_score(CONFIG, params, mesh)(params, to_global(alone, mesh)), np.float64)
    return -(alone["weights"] * alone["advantages"] * logp).sum() / alone["weights"].sum()


def laid_out(A, B, **options):
    prompts, samples, rewards = draw()
    shape = {"micro_batches": A, "rows": B}
    return packed_rows(prompts, samples, advantages(rewards), T, bos=BOS, **shape, **options)


@pytest.mark.parametrize(("A", "B", "spec"), [(1, 8, "data=1"), (4, 2, "data=1"), (1, 8, "data=8")])
def test_neither_micro_batches_nor_devices_nor_packing_change_the_numbers(A, B, spec):
    found = train(laid_out(A, B), spec)
    np.testing.assert_allclose(found[0], plain_loss(), rtol=1e-4)
    np.testing.assert_allclose(found, train(laid_out(1, 8)), rtol=1e-5)


def test_leaving_out_groups_without_signal_changes_no_number():
    everything, signal = laid_out(1, 8, every_group=True), laid_out(1, 8)
    assert everything["weights"].sum() > signal["weights"].sum()
    np.testing.assert_allclose(train(everything), train(signal), rtol=1e-5)


def test_the_end_token_gets_a_gradient():
    """A sample that is nothing but its end token: nanochat's rows learn nothing from it, ours do."""
    samples, given_advantages = [[sample([END]), sample([5, 6], ended=False)]], np.array([[0.5, 0]])
    ours = packed_rows([[BOS, 3]], samples, given_advantages, T, bos=BOS, micro_batches=1, rows=8)
    theirs = nanochat_rows([[BOS, 3]] * 4, samples * 4, np.tile(given_advantages, (4, 1)), T, pad=END, rows=2)
    theirs = {name: leaf.reshape(1, 8, T) for name, leaf in theirs.items()}
    assert train(ours)[1] > 1e-3 and train(theirs)[1] == 0
