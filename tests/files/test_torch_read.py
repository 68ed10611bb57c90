"""Plain checkpoints are read exactly; everything else is refused in one sentence, and nothing in a file ever runs."""

import collections
import os
import pickle
import random
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from nanochat_jax.files.plain_pickle import MAX_DEPTH, MAX_PICKLE, Refused
from nanochat_jax.files.tiktoken_read import read_tokenizer_pickle
from nanochat_jax.files.torch_read import read_pt
from tests.support.torch_files import Raw, Tensor, write_pt


def write_pickle_record(path, opcodes: bytes):
    """A torch zip whose data.pkl is these opcodes."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", opcodes)
    return path


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------------------------------------------------------------
# Plain files


def test_nested_plain_data_and_tensors_of_every_type_come_back_exactly(tmp_path):
    grid = np.arange(24).reshape(2, 3, 4)
    types = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    data = {name: grid.astype(name) for name in types} | {"bfloat16": grid.astype(ml_dtypes.bfloat16)}
    data |= {"scalar": np.array(3.5, np.float32), "none": np.zeros((0, 5), np.float32), 7: "seven"}
    data["nested"] = collections.OrderedDict(
        list=[1, -5, 2**40, -(2**40), 0.1, True, False, None], tuple=(1, (2, "zwei"))
    )
    write_pt(tmp_path / "a.pt", data)
    assert equal(read_pt(tmp_path / "a.pt"), data)
    write_pt(tmp_path / "bare.pt", grid)
    assert equal(read_pt(tmp_path / "bare.pt"), grid)


def test_views_of_one_storage_have_their_own_geometry(tmp_path):
    x = np.arange(24, dtype=np.float32)
    views = {
        "whole": Tensor(x, 0, (4, 6), (6, 1)),
        "transposed": Tensor(x, 0, (6, 4), (1, 6)),
        "part": Tensor(x, 6, (2, 3), (6, 2)),
        "repeated": Tensor(x, 5, (3, 2), (0, 1)),
    }
    write_pt(tmp_path / "v.pt", views)
    got = read_pt(tmp_path / "v.pt")
    grid = x.reshape(4, 6)
    assert np.array_equal(got["whole"], grid) and np.array_equal(got["transposed"], grid.T)
    assert np.array_equal(got["part"], grid[1:3, ::2]) and got["repeated"].tolist() == [[5, 6]] * 3
    assert not any(tensor.flags.writeable for tensor in got.values())


def test_reading_a_big_file_allocates_almost_nothing(tmp_path):
    x = np.ones(16 << 20, np.float32)
    write_pt(tmp_path / "big.pt", {"x": x})
    tracemalloc.start()
    got = read_pt(tmp_path / "big.pt")["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(got, x) and peak < 1 << 20, f"reading 64 MiB allocated {peak:,} bytes"


def test_storages_at_odd_places_are_read_into_aligned_arrays(tmp_path):
    x = np.arange(5, dtype=np.float64)
    for align in (1, 2, 3, 5, 7, 16):
        write_pt(tmp_path / "odd.pt", {"x": x}, align=align)
        got = read_pt(tmp_path / "odd.pt")["x"]
        assert np.array_equal(got, x) and got.flags.aligned and not got.flags.writeable


# ---------------------------------------------------------------------------------------------------------------------
# Nothing runs


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_in_the_file_is_refused_and_not_made(tmp_path, protocol):
    marker = tmp_path / "ran"
    evil = pickle.dumps({"w": Evil(marker)}, protocol)
    write_pickle_record(tmp_path / "evil.pt", evil)
    (tmp_path / "evil.pkl").write_bytes(evil)
    word = "system" if protocol >= 2 else "which plain data does not need"
    for read, name in ((read_pt, "evil.pt"), (read_tokenizer_pickle, "evil.pkl")):
        with pytest.raises(Refused, match=rf"{name}: .*{word}"):
            read(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "torch._utils _rebuild_qtensor", "torch load", "collections deque", "tiktoken.core Encoding"],
)
def test_a_forbidden_name_is_told_even_if_it_is_never_called(tmp_path, name):
    write_pt(tmp_path / "a.pt", {"w": Raw(f"c{name.replace(' ', chr(10))}\n".encode())})
    with pytest.raises(Refused, match=rf"a\.pt: it asks for '{name.replace(' ', '.')}'"):
        read_pt(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ctorch\nFloatStorage\n)R.",  # a storage type is called
        b"ctorch\nSize\nX\x02\x00\x00\x00ab\x85R.",  # a size of a text
        b"ctorch._utils\n_rebuild_parameter\nK\x01\x85R.",  # a parameter of a number
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",  # too few arguments
        b"ccollections\nOrderedDict\n}b.",  # an attribute is set on a name
        b"K\x01K\x02R.",  # a number is called
        b"]K\x01K\x02s.",  # an item is set in a list
        b"}K\x01a.",  # something is appended to a dict
        b"}]K\x01s.",  # a list is a key
        b"K\x01Q.",  # a storage that is a number
        b"}}K\x01b.",  # attributes of a dict
        b"K\x01K\x02.",  # two objects
        b".",  # none
        b"(K\x01.",  # an open mark
        b"t.",  # a tuple without a mark
        b"h\x05.",  # an unknown memo
        b"K\x01",  # no end
        b"\xff.",  # no such opcode
        b"X\xff\xff\xff\xffab.",  # a text of 4 GB
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",  # bytes of 8 EB
        b"",
    ],
)
def test_malformed_pickles_are_refused_with_the_path(tmp_path, opcodes):
    path = write_pickle_record(tmp_path / "bad.pt", b"\x80\x02" + opcodes)
    with pytest.raises(Refused, match=r"bad\.pt: "):
        read_pt(path)


def test_a_memo_number_of_a_billion_costs_nothing(tmp_path):
    path = write_pickle_record(tmp_path / "memo.pt", b"\x80\x02K\x01r\xff\xff\xff\x7f.")  # pickle.load takes 16 GB
    tracemalloc.start()
    assert read_pt(path) == 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_deep_and_circular_data_is_refused(tmp_path):
    deep = 30_000
    cases = {
        "lists": b"]" * deep + b"a" * (deep - 1),
        "tuples": b")" + b"\x85" * deep,
        "dicts": b"}" + b"K\x01}" * deep + b"s" * deep,
        "itself": b"]q\x00h\x00a",
        "in turn": b"]q\x00]h\x00aa",
        "through a dict": b"}q\x00K\x01](h\x00es",
        "as a key": b"}" + b")" + b"\x85" * deep + b"K\x01s",
    }
    for name, opcodes in cases.items():
        path = write_pickle_record(tmp_path / f"{name}.pt", b"\x80\x02" + opcodes + b".")
        with pytest.raises(Refused, match=r"contains itself|nested deeper|keys must be"):
            read_pt(path)
    path = write_pickle_record(tmp_path / "ok.pt", b"]" * MAX_DEPTH + b"a" * (MAX_DEPTH - 1) + b".")
    assert read_pt(path)[0][0] is not None


def test_shared_data_that_would_be_huge_when_written_out_is_no_problem(tmp_path):
    tuples = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    got = read_pt(write_pickle_record(tmp_path / "tuples.pt", b"\x80\x02" + tuples + b"."))
    assert len(got) == 2 and got[0] is got[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that do not fit their data


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (20, (4, 6), (6, 1)),  # begins too late
        (0, (5, 6), (6, 1)),  # too many rows
        (0, (1 << 20, 1 << 20), (0, 0)),  # a huge array of one element
        (0, (4, 6), (6,)),
        (0, (4, -1), (6, 1)),
        (0, (4, 6), (-6, 1)),
        (-1, (4,), (1,)),
        (25, (0,), (1,)),  # empty, and outside
        (0, (0, 1 << 61), (1, 1)),
        (0, (1 << 62,), (1,)),
        (0, (4.0,), (1,)),
        (0, (True,), (1,)),
        (0, (1,) * 40, (1,) * 40),
        (0, "ab", (1, 1)),
        (None, (4,), (1,)),
    ],
)
def test_bad_geometry_is_refused_with_the_tensors_key(tmp_path, offset, size, stride):
    write_pt(tmp_path / "g.pt", {"good": np.ones(3), "bad.weight": Tensor(np.ones(24, "f4"), offset, size, stride)})
    with pytest.raises(Refused, match=r"g\.pt: ") as refusal:
        read_pt(tmp_path / "g.pt")
    assert "bad.weight" in str(refusal.value) or (offset, size) == (0, (0, 1 << 61))


@pytest.mark.parametrize("claimed", [23, 25, 1 << 60, -1, True])
def test_a_storage_of_another_size_than_claimed_is_refused_with_its_number(tmp_path, claimed):
    write_pt(tmp_path / "s.pt", {"w": Tensor(np.ones(24, "f4"), 0, (1,), (1,), claimed)})
    with pytest.raises(Refused, match=r"s\.pt: .*storage.*at key 'w'"):
        read_pt(tmp_path / "s.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and foreign files


def example(tmp_path):
    rng = np.random.default_rng(0)
    data = {"a": rng.normal(size=(7, 5)).astype("f4"), "b": rng.integers(0, 9, 40), "lr": 0.1, "name": "text"}
    write_pt(tmp_path / "e.pt", data)
    return data, (tmp_path / "e.pt").read_bytes()


def read_or_none(path, read=read_pt):
    """The content, or None where the file is refused as it should be: in one line that begins with its path."""
    try:
        return read(path)
    except Refused as e:
        message = str(e)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return None


def test_any_flipped_bit_is_refused_or_harmless(tmp_path):
    data, raw = example(tmp_path)
    path, refused = tmp_path / "flip.pt", 0
    for at in range(len(raw)):  # every byte of the file, one random bit of it
        flipped = bytearray(raw)
        flipped[at] ^= 1 << random.Random(at).randrange(8)
        path.write_bytes(flipped)
        got = read_or_none(path)
        refused += got is None
        assert got is None or equal(got, data), f"the file reads differently after a flip in byte {at}"
    assert refused > 0.5 * len(raw)


def test_any_random_damage_is_refused_or_harmless(tmp_path):
    data, raw = example(tmp_path)
    path, rng = tmp_path / "noise.pt", random.Random(1)
    for trial in range(300):
        noisy = bytearray(raw)
        for _ in range(rng.choice([1, 2, 8])):
            at = rng.randrange(len(raw) - 8)
            noisy[at : at + 8] = rng.choice([rng.randbytes(8), b"\xff" * 8, bytes(8), noisy[at + 1 : at + 9]])
        path.write_bytes(noisy)
        got = read_or_none(path)
        assert got is None or equal(got, data), f"the file reads differently after damage {trial}"


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    _, raw = example(tmp_path)
    path = tmp_path / "cut.pt"
    for length in range(0, len(raw), 3):
        path.write_bytes(raw[:length])
        assert read_or_none(path) is None, f"{length} of {len(raw)} bytes were read as a whole file"


def test_a_flipped_bit_in_a_tensor_is_named(tmp_path):
    x = np.arange(64, dtype=np.float32)
    write_pt(tmp_path / "f.pt", {"transformer.wte.weight": x})
    raw = bytearray((tmp_path / "f.pt").read_bytes())
    raw[raw.index(x.tobytes()) + 9] ^= 1
    (tmp_path / "f.pt").write_bytes(raw)
    with pytest.raises(Refused, match=r"f\.pt: record data/0 is damaged: .*CRC.*'transformer\.wte\.weight'"):
        read_pt(tmp_path / "f.pt")


def test_foreign_files_are_refused_by_what_they_are(tmp_path):
    x = {"w": np.zeros(300, np.float32)}
    path = tmp_path / "x.pt"

    def refuses(match, path=path):
        with pytest.raises(Refused, match=match):
            read_pt(path)

    path.write_bytes(b"")
    refuses("empty")
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"...")
    refuses("old format")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuses("begins with b'version ")
    write_pt(path, x, byteorder=b"big")
    refuses("big-endian")
    write_pt(path, x, compressed=True)
    refuses("compressed")
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/other", b"")
    refuses("has 0")
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", b"K\x01.")
        z.writestr("b/data.pkl", b"K\x02.")
    refuses("has 2")
    write_pickle_record(path, b"N0" * (MAX_PICKLE // 2) + b"N.")
    refuses("at most 67,108,864 bytes")
    refuses("directory", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist"):
        read_pt(tmp_path / "absent.pt")


def test_two_records_of_one_name_are_refused(tmp_path):
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", b"K\x01.")
        z.writestr("a/data.pkk", b"K\x02.")
    path.write_bytes(path.read_bytes().replace(b"data.pkk", b"data.pkl"))
    with pytest.raises(Refused, match="same name"):
        read_pt(path)


@pytest.mark.parametrize("key", [2**31, -(2**31) - 1, 2**61 - 1, 1 << 2000, 0.5])
def test_keys_that_could_all_have_one_hash_are_refused(tmp_path, key):
    path = write_pickle_record(tmp_path / "keys.pt", pickle.dumps({key: None}, 2))
    with pytest.raises(Refused, match=r"keys must be texts or integers of 32 bits, got "):
        read_pt(path)
    fine = {2**31 - 1: None, -(2**31): None}
    assert read_pt(write_pickle_record(tmp_path / "fine.pt", pickle.dumps(fine, 2))) == fine


def test_marks_without_end_are_refused_while_they_are_read(tmp_path):
    path = write_pickle_record(tmp_path / "marks.pt", b"\x80\x02" + b"(" * 300 + b"\xff")  # not read as far as \xff
    with pytest.raises(Refused, match="nested deeper"):
        read_pt(path)
