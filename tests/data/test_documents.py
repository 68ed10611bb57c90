"""Pretraining rows from parquet shards. Run: python -m pytest tests/data/test_documents.py"""

import itertools
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data import documents
from nanochat_jax.data.batches import train_batches, validation_batches
from nanochat_jax.data.documents import DocumentRows, describe_documents
from nanochat_jax.data.packing import plan_epoch
from nanochat_jax.data.shards import Documents, find_shards
from tests.support import tiny

TOKENIZER = tiny.tokenizer()


@pytest.fixture(autouse=True)
def in_base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def shard(path, texts, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"source": ["x"] * len(texts), "text": texts}), path, **options)
    return path


def lettered(path, lengths, first="a"):
    """A shard whose document i is one letter of the alphabet, `lengths[i]` times."""
    return shard(path, [chr(ord(first) + i) * n for i, n in enumerate(lengths)])


def silent(*_):
    pass


def rows_of(shards, T=64, **options):
    return DocumentRows(shards, TOKENIZER, T, log=silent, **options)


def texts_of(rows, row):
    """What lies in a row, each piece as its text, without bos."""
    return [TOKENIZER.decode(ids[1:]) for ids, _ in rows.contents(row)]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_begin_with_bos_are_full_and_all_of_them_is_trained(tmp_path):
    rows = rows_of([lettered(tmp_path / "a.parquet", [2, 3, 9, 4, 4, 30, 1, 7])], T=11, buffer_size=3)
    batch = rows.batch(range(rows.plan(0).n_rows))
    assert (batch["inputs"][:, 0] == TOKENIZER.bos).all()
    assert (batch["weights"] == 1).all() and (batch["document_start"][:, 0] == 0).all()
    starts = batch["document_start"] == np.arange(11)
    assert ((batch["inputs"] == TOKENIZER.bos) == starts).all()  # a document begins where bos is, and nowhere else
    assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all()


def test_the_shortest_document_is_cut_where_none_fits(tmp_path):
    rows = rows_of([lettered(tmp_path / "a.parquet", [4, 3, 3, 6, 1, 6])], T=7, buffer_size=4)
    # with bos: a 5, b 4, c 4, d 7, e 2, f 7, in rows of 8
    assert [texts_of(rows, r) for r in range(3)] == [["dddddd", ""], ["ffffff", ""], ["aaaa", "cc"]]


def test_a_document_longer_than_a_row_is_several_pieces_each_behind_a_bos(tmp_path):
    rows = rows_of([shard(tmp_path / "a.parquet", ["abcdefghijklmnop", "wxyz"])], T=7)
    assert [texts_of(rows, r) for r in range(3)] == [["abcdefg"], ["hijklmn"], ["wxyz", "op"]]
    assert rows.plan(0).n_rows == 3 and "leaves out 0.0% of the tokens" in describe_documents(rows, 1)[2]


def test_pieces_cover_every_token_once_and_fit():
    document, start, lengths = documents.split_into_pieces(np.array([5, 9, 1, 17, 8]), np.array([3, 1, 0, 2, 4]), 7)
    assert document.tolist() == [3, 3, 3, 1, 1, 0, 2, 4]
    assert start.tolist() == [0, 8, 15, 0, 8, 0, 0, 0]
    assert lengths.tolist() == [8, 8, 3, 8, 2, 5, 1, 8]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=12, max_size=60), st.integers(4, 24), st.integers(1, 9), st.integers(0, 3))
def test_a_row_holds_beginnings_of_documents_and_no_document_comes_twice_an_epoch(
    tmp_path_factory, lengths, T, size, e
):
    rng = random.Random(sum(lengths))
    lengths = [min(n, T - 2) for n in lengths]  # each in one piece, with the two bytes that tell which it is
    texts = [chr(0x100 + i) + "".join(rng.choices("abcdefgh", k=n)) for i, n in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("shards")
    shards = [shard(folder / f"{i}.parquet", texts[i::2]) for i in range(2)]
    rows = rows_of(shards, T=T, buffer_size=size)
    first = sum(rows.plan(section).n_rows for section in range(2 * e))
    count = sum(rows.plan(section).n_rows for section in (2 * e, 2 * e + 1))
    left = {tuple(tokens[:2]): tokens for tokens in map(TOKENIZER.encode, texts)}
    for row in range(first, first + count):
        pieces = rows.contents(row)
        assert sum(len(ids) for ids, _ in pieces) == T + 1
        for place, (ids, mask) in enumerate(pieces):
            body = ids[1:].tolist()
            assert ids[0] == TOKENIZER.bos and mask.all()
            if len(body) < 2:  # cut so short that it may be of any document
                assert place == len(pieces) - 1
                continue
            text = left.pop(tuple(body[:2]))  # a KeyError where it has been used before
            assert body == text[: len(body)] and (place == len(pieces) - 1 or len(body) == len(text))
    assert rows.epoch(first + 1) == e + 1


def test_each_epoch_takes_shards_and_documents_in_an_order_of_its_own(tmp_path):
    shards = [lettered(tmp_path / f"{i}.parquet", [9] * 6, "agmsy"[i]) for i in range(4)]
    rows = rows_of(shards, T=9)

    def epoch(e):
        assert [rows.plan(s).n_rows for s in range(24)] == [6] * 24
        return ["".join(text[0] for text in texts_of(rows, r)) for r in range(24 * e, 24 * e + 24)]

    assert epoch(0) == list("abcdefghijklmnopqrstuvwx")
    assert sorted(epoch(1)) == epoch(0) != epoch(1)
    assert sorted(epoch(2)) == epoch(0) and epoch(2) not in (epoch(0), epoch(1))
    shards_of_epoch_1 = [epoch(1)[i : i + 6] for i in range(0, 24, 6)]
    assert {"".join(sorted(part)) for part in shards_of_epoch_1} == {"abcdef", "ghijkl", "mnopqr", "stuvwx"}
    assert epoch(1) == epoch(1)
    other = rows_of(shards, T=9, seed=1)
    assert ["".join(t[0] for t in texts_of(other, r)) for r in range(24, 48)] != epoch(1)
    assert [rows.epoch(row) for row in (0, 23, 24, 33, 48)] == [1, 1, 2, 2, 3]


def test_rows_are_the_same_for_any_number_of_processes_and_from_any_start(tmp_path):
    shards = find_shards(tiny.write_shards(tmp_path / "shards", (30, 20, 5)))[:-1]
    how = {"rows_per_step": 8, "micro_batches": 2, "prefetch": 0}
    alone = list(itertools.islice(train_batches(rows_of(shards), start_row=0, **how), 40))
    assert sum(rows_of(shards).plan(s).n_rows for s in (0, 1)) < 40 * 8  # into the second epoch
    for count in (2, 4):
        parts = [
            train_batches(rows_of(shards), start_row=24 * 8, process_index=p, process_count=count, **how)
            for p in range(count)
        ]
        for k in range(24, 40):
            joined = np.concatenate([next(part)["inputs"] for part in parts], 1)
            assert (joined == alone[k]["inputs"]).all()


def test_validation_rows_are_the_same_each_time(tmp_path):
    *_, held_out = find_shards(tiny.write_shards(tmp_path / "shards"))
    rows = rows_of([held_out])
    first, again = (list(validation_batches(rows, n_rows=10**9, rows_per_batch=8)) for _ in range(2))
    assert sum((batch["weights"].sum(1) > 0).sum() for batch in first) == rows.plan(0).n_rows
    assert all((a["inputs"] == b["inputs"]).all() for a, b in zip(first, again, strict=True))


def test_documents_are_what_the_tokenizer_makes_of_them_after_bos(tmp_path):
    texts = ["", "a", "naïve — 漢字 🙂", "<|bos|> is text", "x" * 3000, " \n\t"]
    rendered = documents.render_documents(TOKENIZER, texts)
    assert [ids.tolist() for ids, _ in rendered] == [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in texts]
    assert all(len(mask) == len(ids) and mask.all() for ids, mask in rendered)


def test_the_next_shard_is_tokenized_when_half_of_this_one_is_used(tmp_path):
    shards = [lettered(tmp_path / f"{i}.parquet", [9] * 6) for i in range(3)]
    shards[2] = lettered(tmp_path / "2.parquet", [8] * 6)
    caches = tmp_path / "base" / "token_cache"

    def built():
        return {path.name[0] for path in caches.glob("*.parquet-*") if "." not in path.name[-20:]}

    rows = rows_of(shards, T=9)
    rows.contents(0)
    assert built() == {"0"}
    rows.contents(3)
    deadline = time.monotonic() + 20
    while built() != {"0", "1"} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert built() == {"0", "1"}


def test_the_start_tells_what_cutting_costs(tmp_path):
    rows = rows_of([lettered(tmp_path / "a.parquet", [9, 9, 9, 6, 6])], T=9)
    first, packed, lost, epochs = describe_documents(rows, 10)
    assert first == f"Training data: 1 shards in {tmp_path}, 5 documents"
    assert packed == "  a.parquet: 5 documents, 44 tokens, packed into 4 rows of 9 tokens"
    assert lost == "  1 of them end with a document that is cut to fill them, which leaves out 9.1% of the tokens"
    assert epochs == "  the run's 10 rows are about 2.5 times all shards"


def test_a_large_shard_is_planned_without_a_gap():
    lengths = np.random.default_rng(0).lognormal(6, 1, 60_000).astype(int) + 1
    plan = plan_epoch(lengths, np.arange(60_000), 2049, documents.BUFFER_SIZE, "fill")
    assert plan.fill == 1 and plan.n_tokens > 0.7 * lengths.sum()


# ---------------------------------------------------------------------------------------------------------------------
# What another run may go on with, and what is refused


def test_the_fingerprint_knows_contents_order_and_length_but_not_the_folder(tmp_path):
    shards = find_shards(tiny.write_shards(tmp_path / "one"))
    moved = find_shards(tiny.write_shards(tmp_path / "two"))
    other = find_shards(tiny.write_shards(tmp_path / "three", seed=1))
    same = rows_of(shards).fingerprint()
    assert rows_of(moved).fingerprint() == same
    changed = [
        rows_of(other),
        rows_of(shards[::-1]),
        rows_of(shards[:2]),
        rows_of(shards, T=65),
        rows_of(shards, seed=1),
    ]
    assert len({same, *(rows.fingerprint() for rows in changed)}) == 6


def test_a_checkpoint_of_the_first_epoch_is_bound_to_the_shards_that_it_has_reached(tmp_path):
    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    rows = rows_of([lettered(path, [9] * 4) for path in paths], T=9)  # 4 rows each
    records = [rows.record(consumed) for consumed in (0, 1, 4, 5, 12, 13)]
    assert [record["shards_reached"] for record in records] == [0, 1, 1, 2, 3, None]

    def go_on(*lengths, T=9):
        other = rows_of([lettered(path, [n] * 4) for path, n in zip(paths, lengths)], T=T)
        return [other.fingerprint(record["shards_reached"]) == record["data"] for record in records]

    assert go_on(9, 9, 9) == [True] * 6
    assert go_on(9, 8, 9) == [True] * 3 + [False] * 3
    assert go_on(9, 9) == [True] * 4 + [False] * 2
    assert go_on(8, 9, 9) == [True] + [False] * 5
    assert go_on(9, 9, 9, T=8) == [False] * 6
    assert records[-1]["data"] == rows.fingerprint()


def test_shards_are_the_parquet_files_of_nanochats_folders_by_name(tmp_path):
    base = tmp_path / "base"
    with pytest.raises(FileNotFoundError, match=r"base_data_climbmix does not exist: give --data-dir FOLDER"):
        find_shards()
    old = tiny.write_shards(base / "base_data", (3, 3, 3))
    (old / "shard_00009.parquet.tmp").write_bytes(b"half")
    (old / ".shard_00000.parquet").write_bytes(b"half")
    assert [path.name for path in find_shards()] == [f"shard_{i:05d}.parquet" for i in range(3)]
    tiny.write_shards(base / "base_data_climbmix", (3, 3))
    assert len(find_shards()) == 2


def test_a_file_in_place_of_the_folder_is_told_from_nothing(tmp_path):
    path = lettered(tmp_path / "a.parquet", [9])
    with pytest.raises(NotADirectoryError, match=r"a\.parquet must be a folder of parquet files: give --data-dir"):
        find_shards(path)


def test_one_shard_is_too_few(tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold at least two parquet files, the last of them for validation, it has 1"
    ):
        find_shards(tiny.write_shards(tmp_path / "one", (3,)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b"PAR1 and no more"), r"a\.parquet is not a readable parquet file"),
        (lambda path: path.write_bytes(b""), r"a\.parquet is not a readable parquet file"),
        (
            lambda path: pq.write_table(pa.table({"content": ["x"]}), path),
            r"a\.parquet has no column text; it has content",
        ),
        (
            lambda path: pq.write_table(pa.table({"text": [1, 2]}), path),
            "the column text must hold strings, it holds int64",
        ),
        (
            lambda path: pq.write_table(pa.table({"text": [["a"]]}), path),
            "the column text must hold strings, it holds list",
        ),
    ],
)
def test_a_shard_that_cannot_be_used_is_named_before_anything_is_read(tmp_path, make, sentence):
    path = tmp_path / "a.parquet"
    make(path)
    with pytest.raises(ValueError, match=sentence):
        rows_of([path])


def test_a_text_that_is_missing_or_damaged_is_found_when_the_shard_is_tokenized(tmp_path):
    hidden = shard(tmp_path / "a.parquet", ["a", None, "b"])
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 1 cannot be rendered: ValueError: the text is missing \(null\)"
    ):
        rows_of([hidden]).plan(0)
    good = shard(tmp_path / "b.parquet", ["some text here"] * 300, compression="none", use_dictionary=False)
    data = bytearray(good.read_bytes())
    data[100:3000] = bytes(2900)
    good.write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.parquet"):
        rows_of([good]).plan(0)
    assert not list((tmp_path / "base" / "token_cache").glob("b.parquet-*/meta.json"))


def test_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"good", b"\xff\xfe bad"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 cannot be rendered: UnicodeDecodeError"):
        rows_of([path]).plan(0)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_will_do(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["ab", "cd", "ab"]).cast(kind)}), path)
    assert [Documents(path)[i] for i in range(3)] == ["ab", "cd", "ab"]


def test_a_shard_without_a_whole_row_is_refused_instead_of_looked_for_for_ever(tmp_path):
    path = shard(tmp_path / "a.parquet", ["short"])
    with pytest.raises(ValueError, match="too few for one row of 65: put more into a shard, or lower --max-seq-len"):
        rows_of([path]).locate(0)


def test_an_empty_shard_is_refused_at_the_start_wherever_it_is(tmp_path):
    good, empty = lettered(tmp_path / "a.parquet", [9]), shard(tmp_path / "b.parquet", pa.array([], pa.string()))
    with pytest.raises(ValueError, match=r"b\.parquet must hold documents, it has 0 rows: take it out of the folder"):
        rows_of([good, empty])


def test_damaged_tokens_of_a_shard_end_the_run_with_what_to_delete(tmp_path):
    rows = rows_of([lettered(tmp_path / "a.parquet", [400_000, 400_000])], T=1000)
    rows.contents(0)  # opens the cache, whose beginning is intact
    ids = rows.cache(0).folder / "ids.npy"
    with open(ids, "r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=f"ids.npy has changed since it was written: delete the folder {ids.parent}"):
        rows.contents(rows.plan(0).n_rows - 1)
