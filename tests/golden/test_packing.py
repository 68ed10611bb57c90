"""nanochat's own batches from this project's packing: every row of packing.npz, every number of packing_trace.json."""

from itertools import islice

import numpy as np
import pytest

from nanochat_jax.data.packing import pack_rows
from nanochat_jax.data.rows import assemble
from nanochat_jax.tokenizer import Tokenizer
from tests.golden import data

RUNS = (
    sorted(data.load_json("packing_trace.json")["runs"])
    if (data.GOLDEN / "packing_trace.json").exists()
    else ["(none)"]
)


@pytest.fixture(scope="module")
def rendered():
    """(tokenizer, renderings), by the tokenizer of c1_master, or where there is none by the first that fits."""
    conversations = data.rows("packing_conversations.jsonl")
    lengths = data.arrays("packing.npz")["rendered_lengths"].tolist()
    named = [name for name in data.tokenizers() if name == "c1_master"]
    for name in named or data.tokenizers():
        tokenizer = Tokenizer.load(data.path(f"checkpoints/{name}/tokenizer"))
        renderings = [tokenizer.render_conversation(conversation) for conversation in conversations]
        if named or [len(ids) for ids, _ in renderings] == lengths:
            return tokenizer, renderings
    return pytest.skip(f"no tokenizer in {data.GOLDEN} renders the conversations to the lengths in packing.npz")


class Stream:
    """nanochat's endless reading order: rank r takes conversations r, r + world, ... modulo the size."""

    def __init__(self, rendered, rank, world):
        self.rendered, self.cursor, self.world, self.epoch = rendered, rank, world, 1

    def __iter__(self):
        while True:
            i = self.cursor
            self.cursor += self.world
            if self.cursor >= len(self.rendered):
                self.cursor %= len(self.rendered)
                self.epoch += 1
            yield i, len(self.rendered[i][0])


def nanochat_batches(rendered, bos, run, capacity, buffer_size):
    """Yield (batch, trace entry) like nanochat's generator: its progress counts batches or conversations picked."""
    n, world = len(rendered), run["world_size"]
    stream = Stream(rendered, run["rank"], world)
    rows = pack_rows(iter(stream), capacity, buffer_size, too_long="block")
    consumed = run["rank"]
    for number in range(1, 1 << 30):
        picked = list(islice(rows, run["device_batch_size"]))
        consumed += world * sum(len(row) for row in picked)
        batch = assemble([[rendered[i] for i, _ in row] for row in picked], capacity - 1, bos)
        targets = np.where(batch["weights"] > 0, batch["targets"], -1)
        progress, last, epoch = consumed / n, consumed >= n, stream.epoch
        if run["num_iterations"] > 0:
            progress, last = number / run["num_iterations"], number >= run["num_iterations"]
        if run["split"] != "train":  # validation does not touch the run's own record
            progress, last, epoch = 0.0, False, 1
        entry = {
            "batch": number,
            "approx_progress": progress,
            "last_step": last,
            "epoch": epoch,
            "inputs_sum": int(batch["inputs"].sum()),
            "targets_sum": int(targets.sum()),
            "n_valid_targets": int(batch["weights"].sum()),
        }
        yield batch["inputs"], targets, entry


def test_renderings_have_nanochats_lengths(rendered):
    arrays = data.arrays("packing.npz")
    np.testing.assert_array_equal([len(ids) for ids, _ in rendered[1]], arrays["rendered_lengths"])


@pytest.mark.parametrize("name", RUNS)
def test_batches_are_nanochats(rendered, name):
    tokenizer, conversations = rendered
    trace, arrays = data.load_json("packing_trace.json"), data.arrays("packing.npz")
    run = trace["runs"][name]
    if run["split"] == "val":
        conversations = conversations[: int("".join(c for c in trace["val_dataset"] if c.isdigit()))]
    batches = nanochat_batches(
        conversations, tokenizer.bos, run, int(arrays["row_capacity"]), int(arrays["buffer_size"])
    )
    inputs, targets = arrays[f"{name}/inputs"], arrays[f"{name}/targets"]
    for b, expected in enumerate(run["trace"]):
        got_inputs, got_targets, entry = next(batches)
        assert entry == expected
        if b < len(inputs):
            np.testing.assert_array_equal(got_inputs, inputs[b])
            np.testing.assert_array_equal(got_targets, targets[b])
