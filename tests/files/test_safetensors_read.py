"""safetensors files: what is read, of every type, and hostile headers, which are refused in one sentence.

Run: python -m pytest tests/files/test_safetensors_read.py
"""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.files.safetensors_read import FILE, INDEX, read_safetensors, read_shards, shard_files
from tests.support.transformers_files import KINDS, packed, safetensors

ARRAYS = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.float32(7).reshape(()), "c": np.zeros((0, 4), "f4")}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refuses(path, content, match):
    path.write_bytes(content)
    with pytest.raises(Refused, match=match) as e:
        read_safetensors(path)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_shape_and_type_are_read_as_views_that_cannot_be_written(tmp_path, kind):
    (tmp_path / FILE).write_bytes(safetensors(ARRAYS, kind))
    got = read_safetensors(tmp_path / FILE)
    assert got.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert got[name].dtype == KINDS[kind] and got[name].shape == array.shape
        assert np.array_equal(got[name].astype("f4"), array) and not got[name].flags.writeable


def test_a_header_of_any_length_and_no_tensor_are_read(tmp_path):
    text = json.dumps({"a": ENTRY}).encode()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text + np.float32([1, 2]).tobytes())
    assert read_safetensors(tmp_path / FILE)["a"].tolist() == [1, 2]
    (tmp_path / FILE).write_bytes(packed({}, b""))
    assert read_safetensors(tmp_path / FILE) == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "at least 8 bytes, this one has 0"),
        (b"1234567", "at least 8 bytes, this one has 7"),
        (packed({"a": ENTRY}, bytes(8), length=2**63), "its header must fit into the file"),
        (packed({"a": ENTRY}, bytes(8), length=1 << 40), "its header must fit into the file"),
        (packed(b"[1]", b""), "its header must be an object, got list"),
        (packed(b"{", b""), "damaged or of another kind"),
        (packed(b"\xff", b""), "damaged or of another kind"),
        (packed(b"[" * 100_000, b""), "damaged or of another kind"),
        (packed(b'{"a": {}, "a": {}}', b""), "a name is twice"),
        (packed({"a": 3}, b""), "'a' must have dtype, shape and data_offsets"),
        (packed({"a": ENTRY | {"x": 1}}, bytes(8)), "'a' must have dtype, shape and data_offsets and nothing else"),
        (packed({"a": ENTRY | {"dtype": "F8_E4M3"}}, bytes(8)), "'a' must be one of F64.*got 'F8_E4M3'"),
        (packed({"a": ENTRY | {"dtype": ["F32"]}}, bytes(8)), "'a' must be one of F64"),
        (packed({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "must be lists of sizes"),
        (packed({"a": ENTRY | {"shape": [2.0]}}, bytes(8)), "must be lists of sizes"),
        (packed({"a": ENTRY | {"shape": [True, 2]}}, bytes(8)), "must be lists of sizes"),
        (packed({"a": ENTRY | {"shape": [1] * 40}}, bytes(8)), "must be lists of sizes"),
        (packed({"a": ENTRY | {"shape": [1 << 61, 1 << 61]}}, bytes(8)), "cannot have 8 bytes"),
        (packed({"a": ENTRY | {"shape": [3]}}, bytes(8)), r"of shape \[3\] in F32 cannot have 8 bytes"),
        (packed({"a": ENTRY | {"data_offsets": [0, 8, 8]}}, bytes(8)), "the second one of two"),
        (packed({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), "must lie within the 8 bytes"),
        (packed({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(8)), "must lie within the 8 bytes"),
        (packed({"a": ENTRY | {"data_offsets": [1 << 61, (1 << 61) + 8]}}, bytes(8)), "must lie within"),
        (packed({"a": ENTRY, "b": ENTRY}, bytes(8)), "must follow one another, but one begins at 0 instead of 8"),
        (packed({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)), "one begins at 8 instead of 0"),
        (packed({"a": ENTRY}, bytes(9)), "its tensors have 8 bytes, but after the header there are 9"),
        (packed({"a": ENTRY}, bytes(7)), "must lie within the 7 bytes"),
        (packed({"x" * 100_000: 3}, b""), "must have dtype"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, content, match):
    refuses(tmp_path / FILE, content, match)


@given(st.data())
def test_a_file_with_any_byte_changed_or_cut_is_read_or_refused(tmp_path_factory, data):
    content = bytearray(safetensors(ARRAYS))
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / FILE
    path.write_bytes(content)
    with contextlib.suppress(Refused):
        assert all(array.nbytes <= len(content) for array in read_safetensors(path).values())


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        read_safetensors(tmp_path / FILE)
    with pytest.raises(Refused, match="this is a directory"):
        read_safetensors(tmp_path)


def write_index(folder, weight_map, **files):
    for name, arrays in files.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors(arrays))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_put_together(tmp_path):
    where = {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}
    write_index(tmp_path, where, x={n: ARRAYS[n] for n in "ac"}, y={"b": ARRAYS["b"]})
    assert read_shards(tmp_path).keys() == ARRAYS.keys()
    assert [path.name for path in shard_files(tmp_path)] == ["x.safetensors", "y.safetensors"]
    (tmp_path / FILE).write_bytes(safetensors({"b": ARRAYS["b"]}))  # one file wins, as for transformers
    assert read_shards(tmp_path).keys() == {"b"} and shard_files(tmp_path) == [tmp_path / FILE]


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({}, "must be an object with a weight_map"),
        ({"a": "../x.safetensors"}, "must name .safetensors files beside it"),
        ({"a": "/x.safetensors"}, "must name .safetensors files beside it"),
        ({"a": "x.pt"}, "must name .safetensors files beside it"),
        ({"a": 3}, "must name .safetensors files beside it"),
        ({"a": "x.safetensors"}, "and model.safetensors.index.json disagree about 'b'"),
        ({"a": "x.safetensors", "b": "x.safetensors", "z": "x.safetensors"}, "disagree about 'z'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, match):
    write_index(tmp_path, weight_map, x={n: ARRAYS[n] for n in "ab"})
    with pytest.raises(Refused, match=match):
        read_shards(tmp_path)
    write_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors does not exist"):
        read_shards(tmp_path)
