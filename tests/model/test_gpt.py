"""Properties of the network: causality, isolation of documents, continued texts, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.interop import nanochat_model
from nanochat_jax.model.attention import attention
from nanochat_jax.model.cost import flops_per_token, kv_bytes_per_token, parameter_counts
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt, window_sizes
from nanochat_jax.model.loss import summed_token_loss, token_logprobs, weighted_nll
from tests.support import reference
from tests.support.models import random_batch, random_params, tiny_config

VARIANTS = {
    "all parts": {},
    "plain": {"residual_lambdas": False, "value_embed_scale": 0.0, "smear": False, "backout": False},
    "one layer": {"n_layer": 1, "windows": (9,)},
}


def build(config, dtype=jnp.float32, seed=0):
    return nnx.merge(abstract_gpt(config, dtype)[0], random_params(config, seed))


def logits_of(model, ids, document_start=None):
    """Of NumPy, as all that tests do with it: nothing more to compile."""
    return np.asarray(_logits(model, ids, document_start))


@jax.jit
def _logits(model, ids, document_start):
    return model(ids, document_start=document_start)


def ids_of(config, B=2, T=48, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T)).astype(np.int32)


def test_window_letters_follow_the_rule_and_the_last_layer_is_long():
    assert window_sizes("SSSL", 6, 2048) == (512, 512, 512, 2048, 512, 2048)
    assert window_sizes("S", 2, 256) == (128, 256)
    assert window_sizes("l", 2, 100) == (100, 100)
    with pytest.raises(ValueError, match="letters S and L"):
        window_sizes("SX", 2, 256)


def test_a_config_that_cannot_be_built_is_refused():
    bad = {"n_embd": (66, 12, 8), "n_kv_head": (3,), "windows": ((1, 2),), "padded_vocab": (80,), "logit_cap": (0, 100)}
    for field, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=r"must|needs"):
                tiny_config(**{field: value})


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_float32_capped_and_cut_to_the_vocabulary(variant):
    config = tiny_config(**VARIANTS[variant])
    logits = logits_of(build(config), ids_of(config))
    assert logits.shape == (2, 48, 90) and logits.dtype == np.float32
    assert np.abs(logits).max() <= config.logit_cap


def test_no_token_sees_the_future():
    config = tiny_config()
    model, ids = build(config), ids_of(config)
    changed = np.where(np.arange(48) < 30, ids, 7).astype(np.int32)
    before, after = logits_of(model, ids), logits_of(model, changed)
    np.testing.assert_allclose(before[:, :30], after[:, :30], atol=1e-5)
    assert np.abs(before[:, 30:] - after[:, 30:]).max() > 1e-3


def test_documents_in_a_row_are_isolated():
    config = tiny_config()
    model, ids = build(config), ids_of(config)
    starts = np.where(np.arange(48) < 20, 0, 20)[None].repeat(2, 0).astype(np.int32)
    packed = logits_of(model, ids, starts)

    def alone(document):
        """With something after it, which it does not see (the test above): one program for all lengths."""
        length = document.shape[1]
        return logits_of(model, np.pad(document, ((0, 0), (0, 48 - length)), constant_values=7))[:, :length]

    np.testing.assert_allclose(packed[:, :20], alone(ids[:, :20]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 20:], alone(ids[:, 20:]), atol=2e-5)
    without = logits_of(model, ids)[:, 20:]  # then they do see each other
    assert np.abs(packed[:, 20:] - without).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_may_come_in_two_pieces(variant):
    config = tiny_config(**VARIANTS[variant])
    model, ids = build(config), ids_of(config)

    @jax.jit
    def in_pieces(model, ids, cut=20):
        x, earlier = model.hidden(ids[:, :cut])

        def attend(layer, q, k, v):
            """Attention over both pieces, with queries of no meaning for the first."""
            k, v = (jnp.concatenate(pair, 1) for pair in zip(earlier[layer], (k, v)))
            q = jnp.pad(q, [(0, 0), (cut, 0), (0, 0), (0, 0)])
            window = config.windows[layer]
            k_start = jnp.maximum(jnp.arange(48)[None].repeat(2, 0) - window, 0) if window >= 0 else jnp.zeros_like(ids)
            return attention(q, k, v, k_start, window=window)[:, cut:], None

        positions = jnp.arange(cut, 48)[None].repeat(2, 0)
        y, _ = model.hidden(ids[:, cut:], positions=positions, previous=ids[:, cut - 1], attend=attend)
        return model.logits(jnp.concatenate([x, y], 1))

    np.testing.assert_allclose(in_pieces(model, ids), logits_of(model, ids), atol=3e-5)


def test_a_batch_that_does_not_divide_the_devices_is_computed_all_the_same():
    config = tiny_config()
    model, ids = build(config), ids_of(config, B=3)
    with jax.set_mesh(make_mesh("data=8")):
        together = logits_of(model, ids)
    for pair in ([0, 1], [1, 2]):  # two rows by themselves, as in other tests: no other program
        np.testing.assert_allclose(together[pair], logits_of(model, ids[pair]), atol=1e-5)


def test_bfloat16_compute_stays_near_float32():
    config = tiny_config()
    ids = ids_of(config)
    exact, rough = (logits_of(build(config, dtype), ids) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).mean() < 0.05 * np.abs(exact).mean()


def test_every_parameter_has_a_gradient():
    config = tiny_config()
    graphdef, params = abstract_gpt(config)[0], random_params(config)
    batch = {k: v[0] for k, v in random_batch(config).items()}
    grads = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(batch["inputs"]) ** 2)))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        grad = np.asarray(grad)
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_a_new_model_is_finite_and_nearly_uniform():
    config = tiny_config()
    logits = logits_of(GPT(config, rngs=nnx.Rngs(0)), ids_of(config))
    assert np.abs(logits).max() < 0.2


def test_parameters_are_counted_by_group():
    counts = parameter_counts(tiny_config())
    D, V, kv = 64, 128, 32
    assert counts["wte"] == counts["lm_head"] == V * D
    assert counts["value_embeds"] == 2 * V * kv  # layers 0 and 2 of three
    assert counts["matrices"] == 3 * (2 * D * D + 2 * kv * D + 8 * D * D) + 2 * 2 * 12
    assert counts["scalars"] == 3 + 3 + 24 + 1 + 1
    assert counts["total"] == sum(leaf.size for leaf in jax.tree.leaves(random_params(tiny_config())))


def test_flops_and_cache_bytes_are_those_of_the_formula():
    config = tiny_config()
    weights = parameter_counts(config)["matrices"] + parameter_counts(config)["lm_head"]
    reach = 7 + 50 + 40  # windows 7, none, 40 at 50 tokens
    assert flops_per_token(config, 50) == 6 * weights + 12 * 64 * reach
    assert flops_per_token(config, 50, "prefill") * 3 == flops_per_token(config, 50)
    assert flops_per_token(config, 50, "decode") == 2 * weights + 4 * 64 * (8 + 50 + 41)
    assert kv_bytes_per_token(config) == 2 * 3 * 32 * 2


def test_configs_survive_json():
    config = tiny_config()
    assert GPTConfig(**{**vars(config), "windows": list(config.windows)}) == config


# What nanochat's code of each era computes (ARCHITECTURE.md), as fields of our config.
OLD_ROPE = {"rope_base": 10_000.0, "qk_scale": 1.0}
ERAS = {
    "A": OLD_ROPE | {"residual_lambdas": False, "value_embed_scale": 0.0, "smear": False, "backout": False},
    "B": OLD_ROPE | {"value_embed_scale": 0.0, "smear": False, "backout": False},
    "C": OLD_ROPE | {"value_embed_scale": 2.0, "value_gate_channels": 32, "smear": False, "backout": False},
    "D": {"qk_scale": 1.15, "smear": False, "backout": False},
    "E": {},
}


def random_config(seed: int) -> GPTConfig:
    """An era's options on sizes of any kind: 1 to 5 layers, grouped heads, windows, a padded vocabulary or not."""
    rng = np.random.default_rng(seed)
    K, G, half = rng.integers(1, 4), rng.integers(1, 4), rng.integers(4, 9)
    V, L = rng.integers(30, 100), rng.integers(1, 6)
    sizes = {
        "n_kv_head": K,
        "n_head": K * G,
        "n_embd": K * G * 2 * half * (1 if K * G > 3 else 4),
        "n_layer": L,
        "vocab_size": V,
        "padded_vocab": V + rng.choice([0, 7, 64]),
        "sequence_len": 16,
    }
    windows = rng.choice([-1, 0, 3, 8, 16, 100], L).tolist()
    options = {"windows": windows, "logit_cap": float(rng.choice([15, 20]))}
    return GPTConfig(**{name: int(size) for name, size in sizes.items()}, **options, **ERAS["ABCDE"[seed % 5]])


def head_of(config):
    return {"cap": config.logit_cap, "vocab_size": config.vocab_size}


def in_float64(params):
    return jax.tree.map(np.float64, params)


def test_the_importer_gives_each_era_its_numbers():
    for era, (values, _) in nanochat_model.ERAS.items():
        assert tiny_config(**values) == tiny_config(**ERAS[era])


@pytest.mark.parametrize("seed", range(10))
def test_logits_and_losses_are_those_of_the_formulas_in_float64(seed):
    config = random_config(seed)
    params = random_params(config, seed)
    batch = {name: array[0] for name, array in random_batch(config, B=2, T=23, seed=seed).items()}

    @jax.jit
    def run(params):
        model, head = nnx.merge(abstract_gpt(config)[0], params), head_of(config)
        x, _ = model.hidden(batch["inputs"], document_start=batch["document_start"])
        return model.logits(x), -token_logprobs(x, params["lm_head"], batch["targets"], **head)

    logits, losses = run(params)
    for row, (ids, starts, targets) in enumerate(zip(batch["inputs"], batch["document_start"], batch["targets"])):
        expected = reference.logits(config, in_float64(params), ids, starts)
        np.testing.assert_allclose(logits[row], expected, atol=5e-5)
        np.testing.assert_allclose(losses[row], reference.losses(expected, targets), atol=5e-5)


@pytest.mark.parametrize("seed", [7, 19])
def test_gradients_are_the_slopes_of_the_formulas_in_float64(seed):
    """Of each kind of parameter, along one random direction: by central differences, which need float64."""
    config = random_config(seed)
    params = random_params(config, seed)
    batch = {name: array[0, 0] for name, array in random_batch(config, B=1, T=23, seed=seed).items()}
    ids, starts, targets, weights = (batch[k] for k in ("inputs", "document_start", "targets", "weights"))

    @jax.jit
    @jax.grad
    def gradients(params):
        x, _ = nnx.merge(abstract_gpt(config)[0], params).hidden(ids[None], document_start=starts[None])
        aux = {"weights": weights[None]}
        return summed_token_loss(weighted_nll, x, params["lm_head"], targets[None], aux, **head_of(config))[0]

    grads, direction = in_float64(gradients(params)), in_float64(random_params(config, seed + 1))

    def slope(along):
        def loss(step):
            moved = jax.tree.map(lambda p, d: p + step * d, in_float64(params), along)
            return weights @ reference.losses(reference.logits(config, moved, ids, starts), targets)

        return (loss(1e-6) - loss(-1e-6)) / 2e-6

    for kind in sorted({path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}):
        along = jax.tree.map_with_path(lambda path, d, kind=kind: d * (path[-1].key == kind), direction)
        pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(along)))
        size = sum(np.linalg.norm(g) * np.linalg.norm(d) for g, d in pairs)
        ours = sum(np.vdot(g, d) for g, d in pairs)
        np.testing.assert_allclose(ours, slope(along), atol=1e-5 * size + 1e-6, rtol=0, err_msg=kind)
