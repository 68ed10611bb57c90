"""Rollouts: their log-probabilities are the model's, and nothing but prompt, key and parameters decides what is drawn.

Run: python -m pytest tests/inference/test_engine.py
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.distributed import device_memory
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference.engine import MOST_ANSWERS, Engine, text_pieces
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.shapes import arrange_slots, padded_size
from nanochat_jax.model.gpt import abstract_gpt
from tests.support.models import random_params, tiny_config
from tests.support.scripted import END, TOKENIZER, call, scripted

CONFIG = tiny_config(vocab_size=265, padded_vocab=320, n_layer=2, windows=(7, -1))  # a ring that turns, grouped heads
PARAMS = random_params(CONFIG)
PROMPTS = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (1, 5, 33, 2, 20)]
SAMPLING = SamplingParams(temperature=0.8, top_k=40, max_new_tokens=36)
# All rows at once, in six calls: the first layer's ring of 22 columns turns in the middle of one. Continuations keep
# their size, as each size is a program; they grow with chunks of 1 and 5. Several tests share these programs.
ROOMY = {"slots": 64, "chunk": 6}


def make(mesh="data=1", config=CONFIG, **settings):
    return Engine(config, TOKENIZER, make_mesh(mesh), **settings)


@pytest.fixture(scope="module")
def engine():
    return make(**ROOMY)


@pytest.fixture(scope="module")
def rollouts(engine):
    return engine.generate(PARAMS, PROMPTS, SAMPLING, samples=3, seed=5, step=2)


@functools.partial(jax.jit, static_argnames="dtype")
def training_logits(params, ids, dtype=jnp.float32):
    return nnx.merge(abstract_gpt(CONFIG, dtype)[0], params)(ids)


def differences(rollouts, params=PARAMS, dtype=jnp.float32):
    """|log-probability kept by the engine - that of the training forward under the same distribution| of each token."""
    size = max(len(p) + len(s.tokens) for p, samples in zip(PROMPTS, rollouts) for s in samples)
    found = []
    for prompt, samples in zip(PROMPTS, rollouts):
        for sample in samples:
            n, ids = len(sample.tokens), [*prompt, *sample.tokens]
            padded = np.pad(np.asarray(ids, np.int32), (0, size - len(ids)))[None]
            logits = np.asarray(training_logits(params, padded, dtype), np.float64)[0, len(prompt) - 1 :][:n]
            kth = np.sort(logits)[:, -SAMPLING.top_k, None]
            logits = np.where(logits < kth, -np.inf, logits) / SAMPLING.temperature
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found.append(np.abs(logp[np.arange(n), sample.tokens] - sample.logprobs))
    return np.concatenate(found)


def assert_same(ours, theirs):
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert (a.ended, a.tool_calls) == (b.ended, b.tool_calls)


def test_log_probabilities_are_those_of_the_training_forward(rollouts):
    found = differences(rollouts)
    assert found.max() < 1e-4 and found.mean() < 1e-5


def test_samples_have_the_types_and_ends_that_are_promised(rollouts):
    for sample in itertools.chain(*rollouts):
        n = len(sample.tokens)
        assert (sample.tokens.dtype, sample.mask.dtype, sample.logprobs.dtype) == (np.int32, np.uint8, np.float32)
        assert sample.mask.shape == sample.logprobs.shape == (n,) and 0 < n <= SAMPLING.max_new_tokens
        ends = np.isin(sample.tokens, [TOKENIZER.bos, TOKENIZER.special("<|assistant_end|>")])
        assert not ends[:-1].any() and ends[-1] == sample.ended and (sample.ended or n == SAMPLING.max_new_tokens)
    firsts = {tuple(sample.tokens[:8]) for sample in itertools.chain(*rollouts)}
    assert len(firsts) == 15  # every sample has its own key


@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 4, "chunk": 5},
        {"chunk": 1},
        {"chunk": 64},
        {"mesh": "data=8", "slots": 16, "chunk": 64},
        {"mesh": "data=2,model=2"},
    ],
    ids=str,
)
def test_slots_chunks_refills_and_devices_change_nothing(rollouts, settings):
    assert_same(make(**settings).generate(PARAMS, PROMPTS, SAMPLING, samples=3, seed=5, step=2), rollouts)


def test_the_order_of_prompts_changes_nothing_where_they_keep_their_numbers(engine, rollouts):
    order = [3, 0, 4, 2, 1]
    mixed = engine.generate(PARAMS, [PROMPTS[n] for n in order], SAMPLING, samples=3, seed=5, step=2, examples=order)
    assert_same([mixed[order.index(n)] for n in range(5)], rollouts)


def test_seed_and_step_change_the_draws(engine, rollouts):
    for change in ({"seed": 6, "step": 2}, {"seed": 5, "step": 3}):
        shorter = SamplingParams(temperature=0.8, top_k=40, max_new_tokens=24)
        other = engine.generate(PARAMS, PROMPTS, shorter, samples=3, **change)
        assert not np.array_equal(other[2][0].tokens[:10], rollouts[2][0].tokens[:10])


def test_a_second_call_compiles_nothing_also_with_other_parameters_and_settings(engine, rollouts):
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    before, stats = engine.compiles, []
    params = jax.tree.map(lambda leaf: leaf + 0.01, PARAMS)
    sampling = SamplingParams(temperature=1.2, top_k=7, max_new_tokens=24)
    events.clear()
    other = engine.generate(params, PROMPTS, sampling, samples=3, step=9)
    assert [name for name in events if "compile" in name] == [] and engine.compiles == before
    assert not np.array_equal(other[2][0].tokens, rollouts[2][0].tokens)
    again = engine.generate(PARAMS, PROMPTS, SAMPLING, samples=3, seed=5, step=2, report=stats.append)
    assert_same(again, rollouts)
    assert stats[0].generated_tokens == sum(len(s.tokens) for s in itertools.chain(*rollouts))


def test_parameters_that_were_cast_are_not_copied_again_and_others_are(engine):
    cast = engine.cast_params(PARAMS)
    assert engine.cast_params(cast) is cast
    half = make(dtype=jnp.bfloat16, **ROOMY).cast_params(cast)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half) if leaf.ndim > 1} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half) if leaf.ndim == 1} == {"float32"}


def test_prompts_within_the_length_to_expect_share_the_decoding_programs():
    engine = make(slots=4, chunk=4, prompt_tokens=len(PROMPTS[2]))
    engine.generate(PARAMS, [PROMPTS[1]], SamplingParams(max_new_tokens=2))
    before = engine.compiles
    engine.generate(PARAMS, [PROMPTS[2]], SamplingParams(max_new_tokens=2))
    assert engine.compiles == before + 1  # the longer prefill


def test_bfloat16_rollouts_stay_near_the_bfloat16_training_forward():
    params = random_params(CONFIG, scale=0.05)
    rollouts = make(dtype=jnp.bfloat16, **ROOMY).generate(params, PROMPTS, SAMPLING, samples=3)
    found = differences(rollouts, params, jnp.bfloat16)
    same_floor = np.isfinite(found)  # bfloat16 noise may put another token in the k-th place
    assert same_floor.mean() > 0.99 and found[same_floor].mean() < 5e-3


def test_a_sample_is_cut_where_the_context_ends():
    prompts = [PROMPTS[4], PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[4]]
    rollouts = make(context=24, **ROOMY).generate(PARAMS, prompts, SamplingParams(0.0, 0, 10), samples=3)
    assert [[len(sample.tokens) for sample in row] for row in rollouts] == [[n] * 3 for n in (4, 10, 10, 10, 4)]
    assert not any(sample.ended for sample in itertools.chain(*rollouts))


def test_a_stream_is_the_first_sample_of_the_first_example_and_may_be_left(engine):
    whole = engine.generate(PARAMS, [PROMPTS[2], *PROMPTS[:2], *PROMPTS[3:]], SAMPLING, samples=3, seed=3)[0][0]
    streamed = list(engine.stream(PARAMS, PROMPTS[2], SAMPLING, seed=3))
    assert streamed == list(zip(whole.tokens.tolist(), whole.mask.tolist()))
    stream = engine.stream(PARAMS, PROMPTS[2], SAMPLING, seed=3)
    assert next(stream) == streamed[0]
    stream.close()


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [([[]], "between 1 and 639"), ([[1] * 640], "between 1 and 639.*has 640"), ([[1], [265]], "prompt 1.*0..264")],
)
def test_prompts_that_cannot_be_continued_are_refused_before_anything_is_compiled(prompts, sentence):
    engine = make()
    with pytest.raises(ValueError, match=sentence):
        engine.generate(PARAMS, prompts, SAMPLING)
    with pytest.raises(ValueError, match="example number"):
        engine.generate(PARAMS, [[1]], SAMPLING, examples=[1, 2])
    assert engine.compiles == 0


def test_settings_that_make_no_sense_are_refused():
    temperatures = [{"temperature": value} for value in (-1.0, float("nan"), float("inf"), 1e39)]
    for bad in (*temperatures, {"top_k": -1}, {"top_k": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": 1.5}):
        with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')}"):
            SamplingParams(**bad)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        make(slots=0)


def test_sizes_that_no_device_could_hold_are_refused_before_anything_is_allocated(monkeypatch):
    with pytest.raises(ValueError, match=r"16,777,217 answers, at most 16,777,216 are held at once: lower"):
        make().generate(PARAMS, [[1]], SamplingParams(), samples=MOST_ANSWERS + 1)
    monkeypatch.setattr(device_memory, "device_memory", lambda device: 1 << 20)
    with pytest.raises(ValueError, match=r"1,024 answers, at their .* of a device's 0.0 GiB: lower --slots=1024"):
        make(slots=1024).generate(PARAMS, [[1]], SamplingParams(), samples=1024)


def test_no_prompts_give_no_samples(engine):
    assert engine.generate(PARAMS, [], SAMPLING) == []


# ---- a scripted model


def test_the_calculator_answers_and_what_was_sampled_there_is_thrown_away(monkeypatch):
    script = [[[*call("2*21"), END, END, END, END, 9, END], [*call("2/0"), 8, END]]]
    ((good, bad),) = scripted(monkeypatch, script, chunk=3)([[1]], SamplingParams(), samples=2)
    answer = [TOKENIZER.special("<|output_start|>"), *TOKENIZER.encode("42"), TOKENIZER.special("<|output_end|>")]
    assert good.tokens.tolist() == [*call("2*21"), *answer, 9, END]
    assert good.mask.tolist() == [1] * 6 + [0] * 4 + [1] * 2 and good.ended
    np.testing.assert_array_equal(good.logprobs, np.where(good.mask, np.float32(-0.5), 0))
    assert [(c.expression, c.result) for c in good.tool_calls] == [("2*21", "42")]
    assert bad.tokens.tolist() == [*call("2/0"), 8, END]
    assert [(c.expression, c.result) for c in bad.tool_calls] == [("2/0", None)]


def test_a_result_longer_than_a_call_of_the_device_is_cut_at_the_limit_only(monkeypatch):
    script = [[[*call("11111111*10001"), 9]]]
    generate = scripted(monkeypatch, script, chunk=3)
    for limit in (18, 20, 27, 40):
        (sample,) = generate([[1]], SamplingParams(max_new_tokens=limit))[0]
        expected = [*call("11111111*10001"), 261 + 2, *b"111122221111", 261 + 3] + [7] * 40
        assert sample.tokens.tolist() == expected[:limit] and not sample.ended
        assert sample.mask.tolist() == ([1] * 16 + [0] * 14 + [1] * 40)[:limit]


def test_without_tools_a_block_is_text(monkeypatch):
    (sample,) = scripted(monkeypatch, [[[*call("1+1"), 9, END]]], tools=None)([[1]], SamplingParams())[0]
    assert sample.tokens.tolist() == [*call("1+1"), 9, END] and sample.mask.all() and not sample.tool_calls


@pytest.mark.parametrize("samples", [1, 12])
def test_a_long_sample_does_not_hold_up_the_others(monkeypatch, samples):
    """144 samples of 5 tokens and one of 150, on 12 rows: no longer than the long one and a little."""
    script = [[[7] * 4 + [END] for _ in range(samples)] for _ in range(144 // samples)]
    script[0][0] = [7] * 149 + [END]
    generate = scripted(monkeypatch, script, slots=12, chunk=8)
    seen, stats = [], []
    rollouts = generate(
        [[1]] * len(script),
        SamplingParams(),
        samples=samples,
        progress=lambda done, total: seen.append((done, total)),
        report=stats.append,
    )
    assert [len(s.tokens) for s in itertools.chain(*rollouts)] == [150] + [5] * 143
    assert stats[0].decode_steps <= 150 + 16
    assert seen == sorted(seen) and seen[-1] == (144, 144)


def test_rows_that_wait_for_the_calculator_do_not_idle_while_long_ones_run_on(monkeypatch):
    caller = [*call("1+1"), 0, 0, 0, *call("2+2"), 0, 0, 0, END]
    script = [[caller] * 8 + [[7] * 59 + [END]] * 4]
    stats = []
    generate = scripted(monkeypatch, script, chunk=64)
    ((*samples,),) = generate([[1]], SamplingParams(), samples=12, report=stats.append)
    assert all(len(s.tokens) == 17 and len(s.tool_calls) == 2 for s in samples[:8])
    assert stats[0].decode_steps == 60


# ---- layout and text


def test_slots_hold_all_samples_at_once_or_small_groups():
    assert arrange_slots(16, 16, 256) == (16, 16)
    assert arrange_slots(32, 16, 256) == (8, 32)
    assert arrange_slots(1000, 16, 256) == (4, 64)
    assert arrange_slots(1000, 1, 256) == (1, 256)
    assert arrange_slots(3, 100, 64) == (21, 3)
    assert arrange_slots(5, 2, 1) == (1, 1)
    assert arrange_slots(17, 15, 256) == (15, 17)  # a size of few would be 24
    assert arrange_slots(17, 8, 256) == (8, 24) and arrange_slots(17, 8, 256, devices=8) == (8, 24)


@given(prompts=st.integers(1, 300), samples=st.integers(1, 40), slots=st.integers(1, 300), devices=st.integers(1, 9))
def test_slots_bound_the_rows_but_for_a_group_that_every_device_must_have(prompts, samples, slots, devices):
    rows, groups = arrange_slots(prompts, samples, slots)
    assert rows * groups <= slots and rows <= samples
    shared, everywhere = arrange_slots(prompts, samples, slots, devices)
    assert shared == rows and everywhere % devices == 0 and everywhere >= min(groups, devices)
    assert everywhere * rows <= max(slots, devices * rows * -(-groups // devices))


def test_sizes_are_few_and_near():
    for least in (1, 16):
        sizes = {padded_size(n, least) for n in range(1, 5000)}
        assert len(sizes) < 26 and all(size % least == 0 for size in sizes)
        assert all(n <= padded_size(n, least) < 1.5 * n + least for n in range(1, 5000))
    assert padded_size(0, 16) == 0


def test_text_comes_in_whole_characters_and_broken_bytes_are_replaced():
    tokens = [*"aé€😀".encode(), 0xFF, *"€".encode()[:2]]
    assert list(text_pieces(TOKENIZER, iter(tokens))) == ["a", "é", "€", "😀", "�", "�"]
    assert "".join(text_pieces(TOKENIZER, iter(tokens))) == TOKENIZER.decode(tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_end_the_call_and_name_the_token(engine, temperature):
    """One token's row of the table is NaN: what comes before it is fed is sampled, and then nothing is."""
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    (sample,) = engine.generate(PARAMS, [[1, 2]], sampling, examples=[4])[0]
    fed = int(np.flatnonzero(~np.isin(sample.tokens[:-1], [*sample.tokens[:3], 1, 2]))[0])  # for the first time
    broken = PARAMS | {"wte": np.array(PARAMS["wte"])}
    broken["wte"][sample.tokens[fed]] = np.nan
    with pytest.raises(FloatingPointError, match=f"not finite at token {fed + 1} of answer 0 to prompt 4: go back"):
        engine.generate(broken, [[1, 2]], sampling, examples=[4])
    with pytest.raises(FloatingPointError, match=f"not finite at token {fed + 1} of answer 0 to prompt 0"):
        list(engine.stream(broken, [1, 2], dataclasses.replace(sampling, max_new_tokens=fed + 2)))


def test_the_smallest_temperatures_draw_the_largest_logit(engine):
    """Also those that a device takes for 0, or that are 0 as float32."""
    (greedy,) = engine.generate(PARAMS, PROMPTS[:1], dataclasses.replace(SAMPLING, temperature=0.0))[0]
    for temperature in (1e-30, 1e-39, 1e-45, 1e-60):
        (sample,) = engine.generate(PARAMS, PROMPTS[:1], dataclasses.replace(SAMPLING, temperature=temperature))[0]
        np.testing.assert_array_equal(sample.tokens, greedy.tokens)
        assert not sample.logprobs.any()
