"""Mixtures of conversations, their rows, and batches of these rows."""

import importlib
import sys

import numpy as np
import pytest

from nanochat_jax.data import conversations
from nanochat_jax.data.batches import train_batches, validation_batches
from nanochat_jax.data.conversations import ConversationRows, ConversationStore, first_rows
from nanochat_jax.data.rows import assemble, shuffled
from nanochat_jax.data.token_cache import TokenCache, open_caches
from nanochat_jax.tasks.mixture import TaskMixture
from nanochat_jax.tasks.task import AdaptedTask
from tests.support.stub_tasks import BOS, END, SilentTokenizer, StubTask, StubTokenizer, make_task


def make_rows(folder, n=60, T=64, seed=0):
    cache = TokenCache.open_or_build(make_task(n), StubTokenizer(), folder, log=str)
    return ConversationRows(ConversationStore([cache], [(0, i) for i in range(n)]), T, seed=seed)


def take(n, batches):
    taken = [next(batches) for _ in range(n)]
    batches.close()
    return taken


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# ---- the mixture


def test_a_store_gathers_its_sources_and_reports_their_shares(tmp_path):
    short, long = StubTask([["a", "bc"]]), StubTask([["d", "e" * 100], ["f", "g"]])
    long.name = "stub/long"
    caches = open_caches([short, long, short], StubTokenizer(), tmp_path, log=str)
    store = ConversationStore(caches, np.array([(1, 0), (0, 0), (2, 0), (1, 1)]))
    assert store.lengths().tolist() == [103, 5, 5, 4] and store.lengths(10).tolist() == [10, 5, 5, 4]
    assert store.trained().tolist() == [101, 3, 3, 2] and store.trained(10).tolist() == [8, 3, 3, 2]
    assert store.get(2)[0].tolist() == [BOS, *b"abc", END]
    assert store.counts(10) == {"stub/task": (2, 10, 6), "stub/long": (2, 14, 10)}


def test_impossible_mixtures_are_refused(tmp_path):
    cache = TokenCache.open_or_build(make_task(3), StubTokenizer(), tmp_path, log=str)
    silent = TokenCache.open_or_build(make_task(3), SilentTokenizer(), tmp_path, log=str)
    with pytest.raises(ValueError, match="no conversations"):
        ConversationStore([cache], np.zeros((0, 2)))
    for pair in [(0, 3), (1, 0), (0, -1)]:
        with pytest.raises(ValueError, match=rf"\(source {pair[0]}, conversation {pair[1]}\)"):
            ConversationStore([cache], [(0, 0), pair])
    with pytest.raises(ValueError, match="different tokenizers"):
        ConversationStore([cache, silent], [(0, 0)])
    with pytest.raises(ValueError, match="no conversation of stub/task has a token to train on"):
        ConversationRows(ConversationStore([silent], [(0, 0)]), 64)


class Counting(StubTask):
    """Says which of its conversations were asked for."""

    def __init__(self, conversations):
        super().__init__(conversations)
        self.asked = set()

    def __getitem__(self, i):
        self.asked.add(i)
        return super().__getitem__(i)

    def fingerprint(self):
        return str(len(self))


def first_and_all(folder, tasks, wanted, T=64, seed=0):
    mixture = TaskMixture([AdaptedTask(task) for task in tasks for _ in range(2)], seed=seed)
    first = first_rows(mixture, StubTokenizer(), folder, T, seed=seed, wanted=wanted, log=str)
    whole = ConversationStore(open_caches(mixture.tasks, StubTokenizer(), folder, log=str), mixture.pairs)
    return first, ConversationRows(whole, T, seed=seed)


@pytest.mark.parametrize("longest", [10, 30, 90])  # the last makes conversations that are longer than a row
@pytest.mark.parametrize("wanted", [1, 40, 120])
def test_the_first_rows_of_a_mixture_do_not_need_its_other_conversations(tmp_path, monkeypatch, longest, wanted):
    monkeypatch.setattr(conversations, "FEWEST", 110)
    tasks = [make_task(n, seed=n, longest=longest) for n in (1500, 1000, 5)]
    first, every = first_and_all(tmp_path, tasks, wanted)
    assert first.rows_in_epoch(0) >= wanted and len(first.store) < len(every.store) == first.mixture_size
    for row in range(first.rows_in_epoch(0)):
        for one, other in zip(first.contents(row), every.contents(row), strict=True):
            assert_equal(dict(enumerate(one)), dict(enumerate(other)))
    again, _ = first_and_all(tmp_path, tasks, wanted)
    assert again.fingerprint() == first.fingerprint() != every.fingerprint()


def test_a_run_that_reads_few_rows_tokenizes_few_conversations_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "FEWEST", 120)
    task = Counting(make_task(4000))
    mixture = TaskMixture([AdaptedTask(task)])
    rows = first_rows(mixture, StubTokenizer(), tmp_path, 64, seed=0, wanted=5, log=str)
    assert len(task.asked) == 120 == len(rows.store)
    said = conversations.describe_conversations(rows)
    assert said[0] == "Training data, the first 120 of 4,000 conversations:" and "120 rows" in said[1]
    assert f"  packed into {rows.rows_in_epoch(0)} rows of 64 tokens" in said[2]


def test_a_run_that_reads_most_of_a_mixture_tokenizes_all_of_it(tmp_path, monkeypatch):
    mixture = TaskMixture([AdaptedTask(make_task(500))])
    assert first_rows(mixture, StubTokenizer(), tmp_path, 64, seed=0, wanted=1, log=str) is None
    monkeypatch.setattr(conversations, "FEWEST", 110)
    assert first_rows(mixture, StubTokenizer(), tmp_path, 64, seed=0, wanted=200, log=str) is None


def test_a_conversation_that_cannot_be_rendered_is_called_by_its_number_in_the_task(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "FEWEST", 110)
    mixture = TaskMixture([AdaptedTask(StubTask([["q", "a"]] * 999))])
    bad = int(mixture.pairs[7, 1])
    mixture.tasks[0].inner[bad] = ["", "a"]
    with pytest.raises(ValueError, match=f"stub/task, row {bad} cannot be rendered: .*no user message"):
        first_rows(mixture, StubTokenizer(), tmp_path, 64, seed=0, wanted=1, log=str)


def test_what_lies_beyond_the_cut_is_not_training_data(tmp_path):
    cache = TokenCache.open_or_build(StubTask([["q" * 100, "answer"]]), StubTokenizer(), tmp_path, log=str)
    store = ConversationStore([cache], [(0, 0)])
    assert ConversationRows(store, 128).n_cut == 0
    with pytest.raises(ValueError, match="within its first 65 tokens"):
        ConversationRows(store, 64)


@pytest.mark.parametrize(("T", "limit"), [(64, 65), (2047, 2048), (2048, 2048), (3000, 3000)])
def test_a_conversation_is_cut_to_the_render_limit_then_to_the_row(tmp_path, T, limit):
    cache = TokenCache.open_or_build(StubTask([["q", "x" * 5000], ["q", "x"]]), StubTokenizer(), tmp_path, log=str)
    rows = ConversationRows(ConversationStore([cache], [(0, 0), (0, 1)]), T)
    assert rows.lengths.tolist() == [limit, 4]
    assert (rows.n_cut, rows.limit) == (1, limit)
    assert rows.batch([0])["weights"].sum() == limit - 2  # not the bos, not the question


# ---- the rows


def test_a_row_tells_targets_weights_and_where_each_document_starts():
    conversations = [([9, 1, 2, 3], [0, 0, 1, 1]), ([9, 4, 5], [0, 1, 1])]
    batch = assemble([conversations, [([9] + [7] * 8, [0] + [1] * 8)], []], T=8, bos=9)
    assert batch["inputs"].tolist() == [[9, 1, 2, 3, 9, 4, 5, 9], [9, 7, 7, 7, 7, 7, 7, 7], [9] * 8]
    assert batch["targets"].tolist() == [[1, 2, 3, 9, 4, 5, 9, 9], [7] * 8, [9] * 8]
    assert batch["weights"].tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1] * 8, [0] * 8]
    assert batch["document_start"].tolist() == [[0, 0, 0, 0, 4, 4, 4, 7], [0] * 8, [0] * 8]
    assert {name: leaf.dtype for name, leaf in batch.items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "document_start": np.int32,
    }
    assert all(leaf.flags.c_contiguous for leaf in batch.values())


def test_a_conversation_that_starts_at_the_rows_last_token_is_only_a_target():
    batch = assemble([[([9, 1, 2], [0, 1, 1]), ([9], [0])]], T=3, bos=9)
    assert batch["targets"].tolist() == [[1, 2, 9]] and batch["document_start"].tolist() == [[0, 0, 0]]


def test_each_epoch_holds_each_conversation_once_in_another_order(tmp_path):
    rows = make_rows(tmp_path)
    plans = [rows.plan(e) for e in range(3)]
    assert all(sorted(plan.items.tolist()) == list(range(60)) for plan in plans)
    assert len({tuple(plan.items.tolist()) for plan in plans}) == 3
    assert rows.plan(1).items.tolist() == plans[1].items.tolist()
    assert make_rows(tmp_path, seed=1).plan(1).items.tolist() != plans[1].items.tolist()
    assert make_rows(tmp_path, seed=1).plan(0).items.tolist() == plans[0].items.tolist()


def test_the_order_of_an_epoch_never_changes():
    """A literal: another order after an upgrade would make a resumed run see other data."""
    assert shuffled(8, 42, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert shuffled(8, 42, 1).tolist() == [1, 2, 5, 3, 6, 0, 4, 7]
    assert shuffled(8, 42, 2).tolist() == [2, 6, 0, 3, 4, 7, 5, 1]


def test_a_row_number_finds_its_epoch(tmp_path):
    rows = make_rows(tmp_path)
    first, second = rows.rows_in_epoch(0), rows.rows_in_epoch(1)
    assert rows.locate(0) == (0, 0) and rows.locate(first - 1) == (0, first - 1)
    assert rows.locate(first) == (1, 0) and rows.locate(first + second) == (2, 0)
    assert rows.epoch(0) == 1 and rows.epoch(first + 1) == 2
    assert make_rows(tmp_path).locate(first + second) == (2, 0)  # asked for at once, as after a resume
    with pytest.raises(IndexError):
        rows.locate(-1)


def test_rows_of_other_data_have_another_fingerprint(tmp_path):
    base = make_rows(tmp_path)
    assert base.fingerprint() == make_rows(tmp_path).fingerprint()
    cache = base.store.caches[0]
    others = [
        make_rows(tmp_path, T=65),
        make_rows(tmp_path, seed=1),
        make_rows(tmp_path, n=59),
        ConversationRows(base.store, 64, buffer_size=99),
        ConversationRows(ConversationStore([cache], base.store.pairs[::-1]), 64),
    ]
    assert len({rows.fingerprint() for rows in [base, *others]}) == 6


def test_weights_count_every_trained_token_of_an_epoch(tmp_path):
    rows = make_rows(tmp_path)
    batch = rows.batch(range(rows.rows_in_epoch(0)))
    assert batch["weights"].sum() == rows.store.counts()["stub/task"].trained_tokens


# ---- the batches


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_batches_joined_are_the_batch_of_one_process(tmp_path, processes):
    rows = make_rows(tmp_path)
    split = {"start_row": 3, "rows_per_step": 16, "micro_batches": 2}
    shares = [take(4, train_batches(rows, **split, process_index=p, process_count=processes)) for p in range(processes)]
    for step in range(4):
        joined = {name: np.concatenate([share[step][name] for share in shares], axis=1) for name in shares[0][step]}
        assert joined["inputs"].shape == (2, 8, 64)
        expected = rows.batch(range(3 + 16 * step, 3 + 16 * (step + 1)))
        assert_equal(joined, {name: leaf.reshape(2, 8, 64) for name, leaf in expected.items()})


def test_resuming_at_any_row_continues_the_stream(tmp_path):
    rows = make_rows(tmp_path)
    R, steps = 5, 3 * rows.rows_in_epoch(0) // 5 + 1  # into the fourth epoch
    whole = take(steps, train_batches(rows, start_row=0, rows_per_step=R))
    for step in range(0, steps, 2):
        (resumed,) = take(1, train_batches(make_rows(tmp_path), start_row=step * R, rows_per_step=R))
        assert_equal(resumed, whole[step])
    single = take(2 * R, train_batches(make_rows(tmp_path), start_row=R, rows_per_step=1, prefetch=0))
    for name in ("inputs", "document_start"):  # the batch size may change on the way
        joined = np.concatenate([batch[name] for batch in single], axis=1)
        np.testing.assert_array_equal(joined, np.concatenate([whole[1][name], whole[2][name]], axis=1))


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    rows = make_rows(tmp_path, n=2)
    assert rows.rows_in_epoch(0) <= 2
    (batch,) = take(1, train_batches(rows, start_row=0, rows_per_step=8, micro_batches=2))
    assert batch["inputs"].shape == (2, 4, 64)
    assert batch["weights"].sum() == rows.batch(range(8))["weights"].sum() > 0


def test_rows_that_cannot_be_shared_out_are_refused(tmp_path):
    rows = make_rows(tmp_path)
    with pytest.raises(ValueError, match="must be a multiple of 6"):
        train_batches(rows, start_row=0, rows_per_step=16, micro_batches=3, process_count=2)
    with pytest.raises(ValueError, match="must be a multiple of 1"):
        train_batches(rows, start_row=0, rows_per_step=0)
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        train_batches(rows, start_row=0, rows_per_step=4, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="at least 0"):
        train_batches(rows, start_row=-1, rows_per_step=4)


def test_validation_rows_are_the_same_each_time_and_come_once(tmp_path):
    rows = make_rows(tmp_path)
    n = rows.rows_in_epoch(0)
    first, again = (list(validation_batches(rows, n_rows=10**6, rows_per_batch=8)) for _ in range(2))
    assert len(first) == -(-n // 8) and all(batch["inputs"].shape == (8, 64) for batch in first)
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    joined = {name: np.concatenate([batch[name] for batch in first]) for name in first[0]}
    assert_equal({name: leaf[:n] for name, leaf in joined.items()}, rows.batch(range(n)))
    assert not joined["weights"][n:].any()
    halves = [
        list(validation_batches(rows, n_rows=10, rows_per_batch=8, process_index=p, process_count=2)) for p in (0, 1)
    ]
    inputs = np.concatenate([np.concatenate([h[k]["weights"] for h in halves]) for k in range(2)])
    np.testing.assert_array_equal(inputs[:10], rows.batch(range(10))["weights"])
    assert not inputs[10:].any()


def test_a_comment_in_a_tasks_module_makes_another_cache_and_the_same_rows(tmp_path, monkeypatch):
    """A run that goes on compares tokens, not source."""
    source = (
        "from nanochat_jax.tasks.task import MadeUpTask, question_and_answer\n\n\nclass Numbers(MadeUpTask):\n"
        "    def make(self, index):\n        return [str(index), 'number']\n\n"
        "    def fingerprint(self):\n        return self.fingerprint_of(self.size)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    prints, folders = [], []
    for text in (source, source + "# a comment\n", source.replace("'number'", "'Number'")):
        (tmp_path / "commented_task.py").write_text(text)
        monkeypatch.delitem(sys.modules, "commented_task", raising=False)
        task = importlib.import_module("commented_task").Numbers("train", 20)
        cache = TokenCache.open_or_build(task, StubTokenizer(), tmp_path / "caches", log=str)
        prints.append(ConversationRows(ConversationStore([cache], [[0, i] for i in range(20)]), 32).fingerprint())
        folders.append(cache.folder)
    assert prints[0] == prints[1] != prints[2] and len(set(folders)) == 3
