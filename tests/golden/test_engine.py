"""The engine against nanochat's: greedy continuations of every era's model, and what a tool call does to a rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference import sampling
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import ControlTokens, SampleInProgress
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt
from nanochat_jax.tokenizer import Tokenizer
from tests.golden import data, models

MESH = {"mesh": make_mesh("data=1")}


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    data.path(f"checkpoints/{name}/tokenizer")
    return Tokenizer.load(data.GOLDEN / "checkpoints" / name / "tokenizer")


def numbered(golden, kind: str) -> dict[int, np.ndarray]:
    """The arrays kind0, kind1, ... by number."""
    return {int(key): array for key, array in models.under(kind, golden).items() if key.isdigit()}


@functools.cache
def greedy(file: str):
    """-> (golden arrays, the engine's sample by the number of its prompt)."""
    golden, name = data.arrays(f"decode/{file}.npz"), models.of_file(file)
    config, params, _ = models.load(name)
    prompts, longest = numbered(golden, "prompt"), max(map(len, numbered(golden, "tokens").values()))
    # Two calls where the second is told the token before (smear), else one, which is two programs less to compile: how
    # keys and values go from call to call does not depend on the era, and tests/inference/test_engine.py is about it.
    engine = Engine(config, tokenizer(name), chunk=16 if config.smear else longest, **MESH)
    with models.rotary_tables_of(file):
        rows = engine.generate(params, [*prompts.values()], SamplingParams(temperature=0.0, max_new_tokens=longest))
    return golden, {n: row[0] for n, row in zip(prompts, rows)}


@pytest.mark.parametrize("file", data.names("decode"))
def test_greedy_continuations_are_nanochats(file):
    """Where the two best logits are nearly equal either may be chosen, and what follows is not compared."""
    golden, samples = greedy(file)
    for n, sample in samples.items():
        tokens, mask, margin = (golden[f"{kind}{n}"] for kind in ("tokens", "mask", "margin"))
        close = np.flatnonzero(margin <= 1e-3)  # nan: a forced token
        sure = close[0] if len(close) else len(tokens)
        np.testing.assert_array_equal(sample.tokens[:sure], tokens[:sure], err_msg=f"prompt {n}")
        np.testing.assert_array_equal(sample.mask[:sure], mask[:sure], err_msg=f"prompt {n}")
        if sure == len(tokens):
            assert len(sample.tokens) == len(tokens)


@pytest.mark.parametrize("file", data.names("decode"))
def test_samples_hold_what_the_batch_interface_returns_and_the_end_token(file):
    golden, samples = greedy(file)
    for n, sample in samples.items():
        if f"batch_row{n}" not in golden or np.nanmin(golden[f"margin{n}"]) <= 1e-3:
            continue
        size = len(sample.tokens) - sample.ended
        row, mask = [*golden[f"prompt{n}"], *sample.tokens[:size]], [0] * len(golden[f"prompt{n}"])
        np.testing.assert_array_equal(row, golden[f"batch_row{n}"])
        np.testing.assert_array_equal([*mask, *sample.mask[:size]], golden[f"batch_mask{n}"])


# ---- a scripted model: what the network would sample at each step is written down; the loop is the engine's own


@pytest.fixture(scope="module")
def scripted():
    """-> (tokenizer's name -> (engine, parameters), traces with the number of their first row in the script)."""
    traces = data.rows("tool_traces.jsonl")
    rows = [row for trace in traces for row in trace["sampled_by_step"]]
    script = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for n, row in enumerate(rows):
        script[n, : len(row)] = row
    first = np.cumsum([0] + [len(trace["sampled_by_step"]) for trace in traces])
    sizes = jnp.array([len(trace["prompt"]) for trace in traces for _ in trace["sampled_by_step"]], jnp.int32)

    def choose_tokens(logits, draws, temperature, top_k):
        row, column = jnp.moveaxis(draws, 1, 0).astype(jnp.int32)
        column = jnp.clip(column, 0, script.shape[1] - 1)
        return jnp.asarray(script)[jnp.clip(row, 0, len(rows) - 1), column], jnp.zeros(len(logits))

    @functools.cache
    def model(name):
        V = tokenizer(name).vocab_size
        sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 48, "windows": (-1,), "sequence_len": 256}
        config = GPTConfig(vocab_size=V, padded_vocab=V, **sizes)
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_gpt(config)[1])
        return Engine(config, tokenizer(name), slots=4, chunk=5, **MESH), params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "sample_keys", lambda seed, step, examples, samples: seed + examples + samples)
        patch.setattr(
            sampling,
            "uniform_draws",
            lambda rows, positions: jnp.stack([rows, positions - sizes[rows]], -1).astype(jnp.float32),
        )
        patch.setattr(sampling, "choose_tokens", choose_tokens)
        patch.setattr(GPT, "logits", lambda self, x: jnp.zeros((*x.shape[:-1], 1024)))
        yield model, list(zip(traces, first.tolist()))


def test_rollouts_with_tool_calls_are_nanochats(scripted):
    model, traces = scripted
    for trace, first in traces:
        engine, params = model(trace["tokenizer"])
        sampling = SamplingParams(max_new_tokens=trace["max_tokens"])
        (samples,) = engine.generate(params, [trace["prompt"]], sampling, samples=trace["num_samples"], seed=first)
        for n, sample in enumerate(samples):
            size = len(sample.tokens) - sample.ended
            assert [*trace["prompt"], *sample.tokens[:size]] == trace["batch_results"][n], trace["name"]
            mask = [0] * len(trace["prompt"]) + sample.mask[:size].tolist()
            assert mask == trace["batch_masks"][n], trace["name"]


def test_streams_with_tool_calls_are_nanochats(scripted):
    """nanochat goes on showing a row that has ended until all have; ours are one row each and stop."""
    model, traces = scripted
    for trace, first in traces:
        engine, params = model(trace["tokenizer"])
        sampling = SamplingParams(max_new_tokens=trace["max_tokens"])
        for n in range(trace["num_samples"]):
            shown = list(engine.stream(params, trace["prompt"], sampling, seed=first + n))
            columns = [(column[n], mask[n]) for column, mask in zip(trace["columns"], trace["column_masks"])]
            assert shown == columns[: len(shown)], trace["name"]
            ended = shown[-1][0] in engine.control_tokens.ends and shown[-1][1] == 1
            assert ended or len(shown) == len(columns) == trace["max_tokens"], trace["name"]


# ---- several turns


def test_conversations_with_an_environment_are_rendered_as_nanochats():
    """The model says what the assistant says, token by token, and the environment what the user says."""
    played = 0
    for row in data.rows("render.jsonl"):
        messages = row.get("conversation", {}).get("messages", []) if "ids" in row else []
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(said) < 2 or messages[-1]["role"] != "assistant" or not all(isinstance(text, str) for text in said):
            continue
        model = tokenizer(row["tokenizer"])
        if row["ids"][-1] != model.special("<|assistant_end|>"):
            continue  # it was cut
        replies = [message["content"] for message in messages if message["role"] == "user"][1:]
        start = row["ids"].index(model.special("<|assistant_start|>")) + 1
        rest, mask = row["ids"][start:], row["mask"][start:]

        def respond(turns, said=said, replies=replies):
            assert turns[::2] == said[: len(turns) // 2 + 1] and turns[1::2] == replies[: len(turns) // 2]
            return [*replies, None][len(turns) // 2]

        sample = SampleInProgress(ControlTokens(model), 0, 0, 100_000, respond, max_turns=100)
        while not sample.finished:
            tokens = sample.forced[:3] or rest[len(sample.tokens) : len(sample.tokens) + 1]
            sample.extend(list(tokens), [0.0] * len(tokens), [0.0] * len(tokens))
        assert (sample.tokens, sample.mask, sample.turns) == (rest, mask, len(said)), messages
        played += 1
    assert played >= 3
