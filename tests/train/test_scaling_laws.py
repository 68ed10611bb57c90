"""The depth dial against numbers worked out by hand. Run: python -m pytest tests/train/test_scaling_laws.py"""

import math

import pytest

from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.train.scaling_laws import config_of_depth, recipe, scaling_params

DIALS = {"aspect_ratio": 64, "head_dim": 128, "window_pattern": "SSSL", "max_seq_len": 2048, "vocab_size": 32768}


def of_depth(depth, **dials):
    return config_of_depth(depth, **(DIALS | dials))


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(1, 128, 1), (3, 256, 2), (4, 256, 2), (12, 768, 6), (20, 1280, 10), (26, 1664, 13)]
)
def test_width_is_64_times_depth_rounded_up_to_whole_heads(depth, width, heads):
    config = of_depth(depth)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (depth, width, heads, heads)


def test_a_model_is_nanochats_of_today():
    config = of_depth(5, vocab_size=50_001, head_dim=64, aspect_ratio=50)
    assert config.windows == (512, 512, 512, 2048, 2048)  # the last one is L, and so is the fourth
    assert (config.n_embd, config.head_dim, config.padded_vocab) == (256, 64, 50_048)
    assert (config.smear, config.backout, config.residual_lambdas, config.rope_base) == (True, True, True, 100_000)
    assert (config.value_embed_scale, config.value_gate_channels, config.qk_scale, config.logit_cap) == (3, 12, 1.2, 15)


def test_scaling_parameters_are_the_matrices_and_the_head():
    gates = 6 * 6 * 12  # every other layer has one, a row of 12 for each head
    assert scaling_params(of_depth(12)) == 12 * 12 * 768**2 + gates + 32768 * 768 == 110_100_912
    counts = parameter_counts(of_depth(12))
    assert counts["value_embeds"] == 6 * 32768 * 768 and counts["wte"] == 32768 * 768  # these do not count


def test_the_reference_trains_its_ratio_in_batches_of_524288():
    found = recipe(of_depth(12), of_depth(12), target_param_data_ratio=12)
    assert (found.total_batch_size, found.rate_factor, found.decay_factor) == (524_288, 1.0, 1.0)
    assert found.iterations == 12 * 110_100_912 // 524_288 == 2520


def test_depth_20_follows_from_the_reference():
    found = recipe(of_depth(20), of_depth(12), target_param_data_ratio=12)
    growth = 435_160_240 / 110_100_912
    assert growth**0.383 == pytest.approx(1.693, abs=1e-3)  # nearest power of two: 2
    assert found.total_batch_size == 1_048_576
    assert found.rate_factor == pytest.approx(math.sqrt(2))
    assert found.decay_factor == pytest.approx(math.sqrt(2) / growth)
    assert found.iterations == 12 * 435_160_240 // 1_048_576 == 4980


def test_a_batch_of_ones_own_scales_rates_by_its_root():
    found = recipe(of_depth(4), of_depth(12), total_batch_size=8192, num_iterations=300)
    assert (found.total_batch_size, found.rate_factor, found.iterations) == (8192, 0.125, 300)
    assert found.decay_factor == pytest.approx(0.125 * 110_100_912 / scaling_params(of_depth(4)))


def test_iterations_go_before_flops_and_flops_before_the_ratio():
    lengths = {"num_iterations": 7, "target_flops": 1e18, "target_param_data_ratio": 12}
    assert recipe(of_depth(12), of_depth(12), **lengths).iterations == 7
    by_flops = recipe(of_depth(12), of_depth(12), **(lengths | {"num_iterations": -1})).iterations
    per_token = 6 * 110_100_912 + 12 * 768 * (9 * 512 + 3 * 2048)
    assert by_flops == round(1e18 / (per_token * 524_288)) == 2511
    assert recipe(of_depth(12), of_depth(12), target_param_data_ratio=0.001 * 12).iterations == 2


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ({}, "one of --num-iterations, --target-flops and --target-param-data-ratio must be above 0"),
        ({"target_param_data_ratio": 1e-9}, r"gives 0 steps of --total-batch-size=524288 tokens"),
        ({"target_flops": 1.0}, r"--target-flops=1 gives 0 steps"),
        ({"total_batch_size": 0, "num_iterations": 1}, "--total-batch-size must be at least 1, or -1"),
        ({"target_flops": 1e300}, "must be from 1 to 2147483647"),
    ],
)
def test_a_length_that_is_none_is_refused(lengths, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe(of_depth(12), of_depth(12), **lengths)


@pytest.mark.parametrize(
    ("dials", "sentence"),
    [
        ({"depth": 0}, "--depth must be from 1 to"),
        ({"aspect_ratio": 0}, "--aspect-ratio must be from 1 to"),
        ({"head_dim": 33}, "--head-dim must be an even number"),
        ({"max_seq_len": 0}, "--max-seq-len must be from 1 to"),
        ({"window_pattern": "SXL"}, "--window-pattern must be made of the letters S and L"),
        ({"depth": 1, "aspect_ratio": 8, "head_dim": 8}, "--head-dim=8, must give a width of at least 24"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_by_its_flags(dials, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_of_depth(**({"depth": 4} | DIALS | dials))
