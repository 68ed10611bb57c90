"""A folder of a zip archive becomes a folder on this disk, whole, and never a file outside of it.

Run: python -m pytest tests/files/test_unzip.py
"""

import zipfile

import pytest

from nanochat_jax.files import unzip
from nanochat_jax.files.unzip import unzip_folder


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_a_folder_arrives_whole_and_other_members_stay_in_the_archive(tmp_path):
    members = [("d/", b""), ("d/a.txt", b"a"), ("d/sub/b.txt", b"b" * 100_000), ("__MACOSX/d/a.txt", b"x"), ("c", b"c")]
    unzip_folder(write_zip(tmp_path / "x.zip", members), "d", tmp_path / "made")
    found = {p.relative_to(tmp_path / "made").as_posix(): p.read_bytes() for p in (tmp_path / "made").rglob("*.txt")}
    assert found == {"a.txt": b"a", "sub/b.txt": b"b" * 100_000}
    assert {path.name for path in tmp_path.iterdir()} == {"x.zip", "made"}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("d/../../evil", b"x")], "leads elsewhere"),
        ([("d/a", b"x"), ("d/..", b"x")], "leads elsewhere"),
        ([("d/..\\evil", b"x")], "leads elsewhere"),
        ([("d/C:evil", b"x")], "leads elsewhere"),
        ([("d/a", b"x"), ("d/A", b"y")], "twice"),
        ([("e/a", b"x")], "must have a folder d"),
        ([("d/", b"")], "must have a folder d"),
        ([], "must have a folder d"),
        ([("/d/a", b"x")], "must have a folder d"),
    ],
)
def test_an_archive_that_could_do_harm_is_refused_and_writes_nothing(tmp_path, members, said):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=said):
        unzip_folder(write_zip(tmp_path / "in" / "x.zip", members), "d", tmp_path / "in" / "made")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.zip"]


def test_an_archive_that_grows_too_large_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "x.zip", [("d/a", b"\0" * 10_000_000)])
    assert archive.stat().st_size < 100_000
    monkeypatch.setattr(unzip, "LARGEST_BYTES", 9_000_000)
    with pytest.raises(ValueError, match="unpacks to 10,000,000 bytes in 1 files, at most 9,000,000"):
        unzip_folder(archive, "d", tmp_path / "made")


@pytest.mark.parametrize("damage", ["cut", "flipped", "none of it"])
def test_a_damaged_archive_is_a_sentence_and_leaves_nothing(tmp_path, damage):
    archive = write_zip(tmp_path / "x.zip", [("d/a", b"some text " * 1000)], zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    data[200] ^= 1
    archive.write_bytes({"cut": data[:500], "flipped": data, "none of it": b"hello"}[damage])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unzip_folder(archive, "d", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_member_that_claims_to_be_small_is_not_unpacked_beyond_that(tmp_path):
    """The sizes that are checked are those of the directory at the end, which a liar writes as well."""
    archive = write_zip(tmp_path / "x.zip", [("d/a", b"\0" * 1_000_000)])
    data = archive.read_bytes().replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unzip_folder(archive, "d", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
