"""A file that only grows keeps its order and loses nothing while the disk is full."""

import errno
import os

import pytest

from nanochat_jax.files.append import AppendedFile


class Disk:
    """os.write onto a disk that has room for so many bytes."""

    def __init__(self, room, monkeypatch):
        self.room, self.write = room, os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = data[: self.room]
        self.room -= len(data)
        return self.write(descriptor, data)


def test_what_a_full_disk_refuses_is_written_first_when_there_is_room_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "log"
    path.write_bytes(b"old\n")
    file, disk = AppendedFile(path), Disk(5, monkeypatch)
    for line in (b"one\n", b"two\n", b"three\n"):
        file.write(line)
    assert path.read_bytes() == b"old\none\nt" and file.size == 18
    said = capsys.readouterr().out
    assert said == f"WARNING: {path} cannot be written (No space left on device): its lines wait in memory\n"
    with pytest.raises(OSError, match="No space left"):
        file.sync()
    disk.room = 1 << 20
    file.write(b"four\n")
    file.sync()
    assert path.read_bytes() == b"old\none\ntwo\nthree\nfour\n" and file.size == len(path.read_bytes())
    assert capsys.readouterr().out == f"{path} has been written again\n"
    file.close()


def test_what_is_lost_when_a_file_is_closed_is_told(tmp_path, monkeypatch, capsys):
    file, disk = AppendedFile(tmp_path / "log"), Disk(2, monkeypatch)
    file.write(b"abc\n")
    file.close()
    assert "WARNING: the last 2 bytes of" in capsys.readouterr().out
    file = AppendedFile(tmp_path / "log")
    assert file.ends_in_the_middle_of_a_line() and file.size == 2
    disk.room = 9
    file.truncate(0)
    file.write(b"whole\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"whole\n"
