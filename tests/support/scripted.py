"""A scripted model: example e, sample s draws the token SCRIPT[e][s][column]; the loop is the engine's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference import sampling
from nanochat_jax.inference.engine import Engine
from nanochat_jax.model.gpt import GPT, abstract_gpt
from tests.support import tiny
from tests.support.models import random_params, tiny_config

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.special("<|assistant_end|>")
CONFIG = tiny_config(vocab_size=265, padded_vocab=320, n_layer=1, windows=(-1,))


def scripted(monkeypatch, script, config=CONFIG, logits=False, **settings):
    """script: [examples][samples][columns] of ids -> generate(prompts, ...) of an engine that draws them behind prompts
    of one token. logits: the network computes its own, whatever is drawn."""
    engine, params = scripted_engine(monkeypatch, script, config, logits, **settings)
    return functools.partial(engine.generate, params)


def scripted_engine(monkeypatch, script, config=CONFIG, logits=False, mesh="data=1", **settings):
    """The engine of `scripted`, and its parameters."""
    ids = np.full((len(script), max(map(len, script)), 200), 7, np.int32)
    for e, samples in enumerate(script):
        for s, row in enumerate(samples):
            ids[e, s, : len(row)] = row

    def choose_tokens(logits, draws, temperature, top_k):
        example, sample, column = jnp.moveaxis(draws, 1, 0)
        return jnp.asarray(ids)[example, sample, column], jnp.full(len(logits), -0.5)

    def uniform_draws(keys, positions):
        return jnp.concatenate([keys, positions[:, None] - 1], 1)

    monkeypatch.setattr(sampling, "sample_keys", lambda seed, step, *numbers: jnp.stack(numbers, -1).astype(jnp.int32))
    monkeypatch.setattr(sampling, "uniform_draws", uniform_draws)
    monkeypatch.setattr(sampling, "choose_tokens", choose_tokens)
    if not logits:
        monkeypatch.setattr(GPT, "logits", lambda self, x: jnp.zeros((*x.shape[:-1], 265)))
    return Engine(config, TOKENIZER, make_mesh(mesh), **settings), random_params(config)


def call(expression):
    """The ids of a call of a tool."""
    start, end = (TOKENIZER.special(f"<|python_{side}|>") for side in ("start", "end"))
    return [start, *TOKENIZER.encode(expression), end]


def result(text):
    """The ids of what is forced behind it."""
    start, end = (TOKENIZER.special(f"<|output_{side}|>") for side in ("start", "end"))
    return [start, *TOKENIZER.encode(text), end]


def apart(config, samples):
    """Mean |policy log-probability kept by the engine - that of the training forward| of the sampled tokens."""
    forward = jax.jit(lambda params, ids: nnx.merge(abstract_gpt(config, jnp.float32)[0], params)(ids))
    gaps = []
    for sample in samples:
        ids = np.pad([1, *sample.tokens], (0, 80 - len(sample.tokens)))[None].astype(np.int32)
        logp = np.asarray(jax.nn.log_softmax(forward(random_params(config), ids)[0]), np.float64)
        n = np.arange(len(sample.tokens))
        gaps.append(np.abs(logp[n, sample.tokens] - sample.policy_logprobs)[sample.mask > 0])
    return np.concatenate(gaps).mean()
