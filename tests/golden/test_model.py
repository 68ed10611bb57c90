"""The network of every era against what nanochat computed: logits, losses, gradients, and decoding with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.loss import summed_token_loss, token_logprobs, weighted_nll
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
def forward(file: str):
    """-> jitted f(ids, targets): (logits, log p of each target)."""
    config, params, _ = models.load(models.of_file(file))

    @quick_jit
    def run(params, ids, targets):
        model = models.built(config, params)
        with models.rotary_tables_of(file):
            x, _ = model.hidden(ids)
        head = {"cap": config.logit_cap, "vocab_size": config.vocab_size}
        return model.logits(x), token_logprobs(x, params["lm_head"], targets, **head)

    return functools.partial(run, params)


@pytest.mark.parametrize(("file", "input"), inputs())
def test_logits_and_losses_are_nanochats(file, input):
    golden = models.under(f"{input}_", data.arrays(f"forward/{file}.npz"))
    targets = golden["targets"]
    logits, logp = jax.device_get(forward(file)(golden["ids"], np.maximum(targets, 0)))
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


class Decoder:
    """All prompts of a decode file as one batch, padded on the right, in front of the model's own cache."""

    def __init__(self, file: str):
        self.config, self.params, _ = models.load(models.of_file(file))
        golden = data.arrays(f"decode/{file}.npz")
        rows = sorted(int(number) for number in models.under("prompt", golden))
        self.prompts, self.tokens, self.masks, self.margins = (
            [golden[f"{kind}{row}"] for row in rows] for kind in ("prompt", "tokens", "mask", "margin")
        )
        self.lengths = np.array([len(prompt) for prompt in self.prompts])
        self.size = 2 * self.lengths.max() + max(map(len, self.tokens))  # for prompts that come in two padded pieces

        @quick_jit
        def append(params, cache, ids, lengths):
            model = models.built(self.config, params)
            with models.rotary_tables_of(file):
                x, cache = model.hidden(ids, cache=cache, lengths=lengths)
            last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], 1)[:, 0]
            return model.logits(last), cache

        self._append = append

    def empty_cache(self):
        return models.built(self.config, self.params).empty_cache(len(self.prompts), self.size)

    def prefill(self, cache, start, stop):
        """Append prompt[start:stop] of each row, padded to the longest prompt -> (logits after the last id, cache)."""
        ids = np.zeros((len(self.prompts), self.lengths.max()), np.int32)
        for row, (prompt, a, b) in enumerate(zip(self.prompts, start, stop)):
            ids[row, : b - a] = prompt[a:b]
        return self._append(self.params, cache, ids, np.asarray(stop - start))

    def append(self, cache, ids):
        """One token a row."""
        return self._append(self.params, cache, np.asarray(ids, np.int32)[:, None], np.ones(len(ids), np.int64))


decoder = functools.cache(Decoder)


@pytest.mark.parametrize("file", models.one_file_a_model("decode"))
def test_greedy_decoding_with_the_cache_chooses_nanochats_tokens(file):
    """The golden tokens are fed, forced ones too; where the two best logits are nearly equal, either may be chosen."""
    d = decoder(file)
    logits, cache = d.prefill(d.empty_cache(), 0 * d.lengths, d.lengths)
    for step in range(max(map(len, d.tokens))):
        logits = np.asarray(logits)
        second, first = np.sort(logits, -1)[:, -2:].T
        for row, tokens in enumerate(d.tokens):
            if step >= len(tokens):
                continue
            margin, where = d.margins[row][step], f"prompt {row}, step {step}"
            if d.masks[row][step] and not margin <= 1e-3:
                assert logits[row].argmax() == tokens[step], where
            if np.isfinite(margin):
                np.testing.assert_allclose(first[row] - second[row], margin, atol=4e-4, rtol=1e-4, err_msg=where)
        logits, cache = d.append(cache, [tokens[step] if step < len(tokens) else 0 for tokens in d.tokens])


@pytest.mark.parametrize("file", models.one_file_a_model("decode"))
def test_a_prompt_may_come_in_two_pieces(file):
    """Cut in the middle: a prompt of one id has an empty first piece."""
    d = decoder(file)
    start, cut = 0 * d.lengths, d.lengths // 2
    whole, cache = d.prefill(d.empty_cache(), start, d.lengths)
    _, half = d.prefill(d.empty_cache(), start, cut)
    np.testing.assert_array_equal(half["length"], cut)
    pieces, pieced_cache = d.prefill(half, cut, d.lengths)
    np.testing.assert_allclose(pieces, whole, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(pieced_cache["length"], cache["length"])
    next_ids = [tokens[0] for tokens in d.tokens]
    np.testing.assert_allclose(d.append(pieced_cache, next_ids)[0], d.append(cache, next_ids)[0], atol=2e-5, rtol=0)
