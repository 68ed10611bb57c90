"""The token cache on disk: what it keeps, and what becomes of damage, of killed builds and of two builds at once."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from nanochat_jax.data import token_cache
from nanochat_jax.data.batches import train_batches
from nanochat_jax.data.conversations import ConversationRows, ConversationStore
from nanochat_jax.data.hashed_array import write_array
from nanochat_jax.data.token_cache import RENDER_BATCH, DamagedCache, TokenCache, open_caches
from nanochat_jax.files.digest import digest_of
from tests.support.stub_tasks import BOS, SilentTokenizer, StubTask, StubTokenizer, make_task


def test_a_cache_gives_back_what_was_rendered(tmp_path):
    task, tokenizer, said = make_task(RENDER_BATCH + 77), StubTokenizer(), []
    built = TokenCache.open_or_build(task, tokenizer, tmp_path, log=said.append)
    opened = TokenCache.open_or_build(task, tokenizer, tmp_path, log=said.append)
    assert len(said) == 1 and "stub/task" in said[0]
    for cache in (built, opened):
        rendered = [tokenizer.render_conversation(conversation, None) for conversation in task]
        for i, (ids, mask) in enumerate(rendered):
            got_ids, got_mask = cache.get(i)
            assert got_ids.dtype == np.uint16 and got_ids.tolist() == ids and got_mask.tolist() == mask
        got_ids, got_mask = cache.get(5, limit=4)
        assert got_ids.tolist() == rendered[5][0][:4] and got_mask.tolist() == rendered[5][1][:4]
        assert cache.lengths.tolist() == [len(ids) for ids, _ in rendered]
        assert cache.trained.tolist() == [sum(mask) for _, mask in rendered]
        assert cache.n_tokens == sum(len(ids) for ids, _ in rendered)
        assert (len(cache), cache.bos, cache.name) == (len(task), BOS, "stub/task")


def test_long_tokenizing_says_how_fast_it_is_and_how_long_it_will_take(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SILENCE", 0.0)
    said = []
    TokenCache.open_or_build(make_task(RENDER_BATCH + 77), StubTokenizer(), tmp_path, log=said.append)
    assert re.fullmatch(r"tokenizing \S+: [\d,]+ of [\d,]+ entries, [\d,]+ a second, [\d,]+ s to go", said[0])


def test_renderings_are_stored_whole_and_wide_vocabularies_take_four_bytes(tmp_path):
    tokenizer = StubTokenizer()
    tokenizer.vocab_size = 65_537
    cache = TokenCache.open_or_build(StubTask([["q", "x" * 5000]]), tokenizer, tmp_path, log=str)
    assert len(cache.get(0)[0]) == 5003 and cache.get(0)[0].dtype == np.uint32


def test_the_cache_of_an_empty_task_opens(tmp_path):
    for _ in range(2):
        cache = TokenCache.open_or_build(StubTask(), StubTokenizer(), tmp_path, log=str)
        assert len(cache) == 0 and cache.n_tokens == 0
    with pytest.raises(IndexError, match="has 0 conversations"):
        cache.get(0)


def test_one_changed_character_or_another_tokenizer_makes_another_cache(tmp_path):
    task, other = StubTask([["hello", "you"]]), StubTask([["hello", "yoo"]])
    first = TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=str)
    second = TokenCache.open_or_build(other, StubTokenizer(), tmp_path, log=str)
    third = TokenCache.open_or_build(task, SilentTokenizer(), tmp_path, log=str)
    assert len({first.folder, second.folder, third.folder}) == 3
    assert first.get(0)[0].tolist() != second.get(0)[0].tolist()


def test_a_task_named_twice_is_opened_once(tmp_path):
    task = make_task(4)
    first, second, third = open_caches([task, make_task(4, seed=1), make_task(4)], StubTokenizer(), tmp_path, log=str)
    assert first is third and first is not second


def test_a_row_that_cannot_be_rendered_is_named_and_leaves_nothing_behind(tmp_path):
    task = make_task(RENDER_BATCH + 9)
    task[RENDER_BATCH + 4] = ["", "answer"]
    with pytest.raises(ValueError, match=rf"stub/task, row {RENDER_BATCH + 4} cannot be rendered: .*no user message"):
        TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=str)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def cut_short(folder):
    path = folder / "ids.npy"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_byte(folder):
    path = folder / "mask.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def lose_a_file(folder):
    (folder / "offsets.npy").unlink()


def break_the_meta_file(folder):
    (folder / "meta.json").write_text("{")


def forget_a_field(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "blocks": {}}))


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte, lose_a_file, break_the_meta_file, forget_a_field])
def test_a_damaged_cache_is_named_and_rebuilt(tmp_path, damage):
    task, said = make_task(20), []
    before = TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=str)
    wanted = [(ids.tolist(), mask.tolist()) for ids, mask in map(before.get, range(20))]
    damage(before.folder)
    after = TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=said.append)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in map(after.get, range(20))] == wanted
    assert len(said) == 2 and str(before.folder) in said[0] and "damaged" in said[0]


def large_cache(folder, text="ab" * 9_000_000):
    """A cache whose ids are 36 MB, its mask 2 MB; and its entries: the text in ten pieces."""
    task, size = StubTask(), len(text) // 10
    task.extend(["q", text[i * size : (i + 1) * size]] for i in range(10))
    return TokenCache.open_or_build(task, QuickTokenizer(), folder, log=str)


class QuickTokenizer(StubTokenizer):
    """Arrays in place of lists, so that megabytes take no time."""

    def render_conversation(self, conversation, max_tokens=2048):
        ids = np.frombuffer("".join(conversation).encode(), np.uint8)[:max_tokens]
        return ids, ids % 2

    def digest(self):
        return "quick"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return large_cache(tmp_path_factory.mktemp("large")).folder


def read_all(folder):
    cache = TokenCache(folder)
    return [len(cache.get(i)[0]) for i in range(len(cache))]


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("file", ["ids.npy", "mask.npy", "offsets.npy", "trained.npy", "meta.json"])
def test_no_flipped_byte_of_a_large_cache_is_read(large, file):
    rng = np.random.default_rng(0)
    size = (large / file).stat().st_size
    for place in rng.integers(0, size, 12).tolist():
        flip(large / file, place)
        try:
            with pytest.raises((DamagedCache, ValueError), match=f"{file}|JSON"):
                read_all(large)
        finally:
            flip(large / file, place)
    assert read_all(large) == [1_800_001] * 10


def test_damage_that_is_met_while_reading_is_one_sentence_that_says_what_to_delete(large):
    place = (large / "ids.npy").stat().st_size // 2
    flip(large / "ids.npy", place)
    try:
        cache = TokenCache(large)  # opening reads the beginning alone
        assert len(cache.get(0)[0]) == 1_800_001
        with pytest.raises(ValueError) as error:
            read_all(large)
        assert str(error.value) == (
            f"the content of ids.npy has changed since it was written: delete the folder {large}, it is built anew"
        )
    finally:
        flip(large / "ids.npy", place)


def test_threads_that_read_at_once_all_get_what_was_written_or_the_error(large):
    place = (large / "ids.npy").stat().st_size - 5  # in the last entry
    flip(large / "ids.npy", place)
    try:
        cache = TokenCache(large)

        def read(i):
            try:
                return len(cache.get(i)[0])
            except ValueError:
                return "damaged"

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(read, [*range(10)] * 4))
        assert found == [*[1_800_001] * 9, "damaged"] * 4
    finally:
        flip(large / "ids.npy", place)


def test_damage_that_the_thread_of_batches_meets_ends_the_run_with_that_sentence(tmp_path):
    cache = TokenCache.open_or_build(StubTask([["q", "ab" * 500]] * 1500), QuickTokenizer(), tmp_path, log=str)
    flip(cache.folder / "ids.npy", (cache.folder / "ids.npy").stat().st_size - 5)
    rows = ConversationRows(ConversationStore([cache], np.array([[0, i] for i in range(1490, 1500)])), 2048)
    batches = train_batches(rows, start_row=0, rows_per_step=5)
    with contextlib.closing(batches), pytest.raises(ValueError, match=f"delete the folder {cache.folder}, it is built"):
        next(batches)


def test_a_changed_token_changes_the_content_that_a_resumed_run_compares(tmp_path):
    one, other = "ab" * 1_500_000, "ab" * 750_000 + "aa" + "ab" * 749_999
    contents = [large_cache(tmp_path, text).content for text in (one, one, other)]
    assert contents[0] == contents[1] != contents[2]


def resigned(**changes):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta = {**meta, **changes}
        del meta["digest"]
        (folder / "meta.json").write_text(json.dumps(meta | {"digest": digest_of(meta)}))

    return damage


def replaced(text):
    return lambda folder: (folder / "meta.json").write_text(text)


def swap_offsets(folder):
    """Offsets that do not ascend, and hashes that fit them."""
    offsets, blocks = np.load(folder / "offsets.npy"), []
    with write_array(folder / "offsets.npy", np.int64, blocks) as append:
        append(offsets[[0, 2, 1, *range(3, len(offsets))]])
    meta = json.loads((folder / "meta.json").read_text())
    resigned(blocks={**meta["blocks"], "offsets.npy": blocks})(folder)


FILES = ("ids.npy", "mask.npy", "offsets.npy", "trained.npy")
HOSTILE = {
    "nested": replaced("[" * 200_000),
    "infinity": resigned(bos=1e999),
    "not a number": resigned(bos=math.nan),
    "a bool": resigned(bos=True),
    "a list": replaced("[]"),
    "a number": replaced("7"),
    "not text": replaced("\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
    "blocks of another type": resigned(blocks=[1]),
    "blocks that are text": resigned(blocks=dict.fromkeys(FILES, "ab")),
    "no blocks": resigned(blocks={file: [] for file in FILES}),
    "a negative size": resigned(tokens=-1),
    "a huge size": resigned(tokens=1 << 80),
    "size as text": resigned(tokens="many"),
    "size as a list": resigned(bytes_of_an_id=[2]),
    "other ids": resigned(bytes_of_an_id=4),
    "another name": resigned(name=None),
    "offsets that do not ascend": swap_offsets,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_damage_and_the_cache_is_built_anew(tmp_path, name):
    task, said = make_task(20), []
    before = TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=str)
    HOSTILE[name](before.folder)
    with pytest.raises(DamagedCache):
        TokenCache(before.folder)
    after = TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=said.append)
    assert len(said) == 2 and "damaged" in said[0] and after.content == before.content


def start_builder(folder, n, in_a_batch):
    """A process that builds the cache of n conversations; `in_a_batch` is run for each batch rendered."""
    program = f"""
import os, signal, time
from pathlib import Path
from nanochat_jax.data.token_cache import TokenCache
from tests.support.stub_tasks import StubTask, StubTokenizer
class Tokenizer(StubTokenizer):
    batches = 0
    def render_many(self, conversations, max_tokens=2048):
        self.batches += 1
        {in_a_batch}
        return super().render_many(conversations, max_tokens)
folder = Path({str(folder)!r})
cache = TokenCache.open_or_build(StubTask([["q", str(i)] for i in range({n})]), Tokenizer(), folder, log=print)
print("opened", len(cache), cache.n_tokens)
"""
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_a_cache_once(tmp_path):
    builders = [start_builder(tmp_path, 50, "time.sleep(1.5)") for _ in range(2)]
    outputs = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert sum("tokenized stub/task" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1 and "opened 50" in outputs[0]


def test_what_a_killed_build_left_is_cleaned_up(tmp_path):
    n = RENDER_BATCH + 5
    killed = start_builder(tmp_path, n, "if self.batches == 2: os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    (left,) = tmp_path.glob("*.building")
    assert (left / "ids.npy").exists()
    cache = TokenCache.open_or_build(StubTask(["q", str(i)] for i in range(n)), StubTokenizer(), tmp_path, log=str)
    assert len(cache) == n and not left.exists()


def test_only_builds_that_nobody_is_at_are_swept(tmp_path):
    for name in ("dead-1", "alive-2"):
        (tmp_path / f"{name}.building").mkdir()
    with FileLock(tmp_path / ".alive-2.lock"):
        TokenCache.open_or_build(make_task(3), StubTokenizer(), tmp_path, log=str)
    assert [p.name for p in tmp_path.glob("*.building")] == ["alive-2.building"]


def test_a_cache_that_is_there_is_opened_without_the_tokenizers_work(tmp_path, monkeypatch):
    task = make_task(30)
    built = TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=str)
    for name in ("render_conversation", "render_many"):
        monkeypatch.delattr(StubTokenizer, name)
    assert len(TokenCache.open_or_build(task, StubTokenizer(), tmp_path, log=str)) == len(built) == 30


def test_caches_that_nobody_opens_are_deleted_by_age_where_all_are_too_large_and_that_is_told_once(
    tmp_path, monkeypatch
):
    month = time.time() - 31 * 86_400
    caches = [TokenCache.open_or_build(make_task(20, seed=i), StubTokenizer(), tmp_path, log=str) for i in range(6)]
    size = sum(file.stat().st_size for file in caches[0].folder.iterdir())
    third = caches[2].get(3)[0].tolist()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "meta.json").write_text("a file of somebody's")
    for place, cache in enumerate([*(c.folder for c in caches[:5]), tmp_path / "mine"]):
        os.utime(cache / "meta.json", (month + place, month + place))
    names, said = [cache.folder.name for cache in caches], []

    def build(seed):
        TokenCache.open_or_build(make_task(20, seed=seed), StubTokenizer(), tmp_path, log=said.append)
        return [names.index(name) for name in names if (tmp_path / name).exists()]

    assert build(10) == [0, 1, 2, 3, 4, 5] and len(said) == 1  # all together are small
    monkeypatch.setattr(token_cache, "KEPT_BYTES", 5.5 * size)
    TokenCache(caches[0].folder)  # opened today
    with FileLock(tmp_path / f".{names[1]}.lock"):  # at work
        assert build(11) == [0, 1, 4, 5]  # the oldest go first, and no more than needed
    assert said[1] == f"deleted 2 token caches of {tmp_path} that no run has opened for 30 days" and len(said) == 3
    monkeypatch.setattr(token_cache, "KEPT_BYTES", 0)
    assert build(12) == [0, 5] and len(said) == 5
    assert build(13) == [0, 5] and len(said) == 6
    assert (tmp_path / "mine" / "meta.json").exists() and not list(tmp_path.glob("*.building"))
    assert caches[2].get(3)[0].tolist() == third  # who has it open may go on
