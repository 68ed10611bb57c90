"""A save that fails ends nothing, what is on the disk survives a power cut, and a folder that is lost is left alone."""

import errno
import os
import shutil
import threading

import jax.numpy as jnp
import pytest

from nanochat_jax.checkpoints import integrity, ownership
from nanochat_jax.checkpoints import saver as saver_module
from nanochat_jax.checkpoints.ownership import FolderLost, Lock, Token, own
from nanochat_jax.checkpoints.saver import Saver

ITEMS = {"params": {"w": jnp.ones((4, 4))}, "optimizer": {"m": jnp.ones((4, 4))}}


def save(saver, step):
    saver.save(step, ITEMS, lambda: {"step": step})
    return saver.failure(wait=True)


def failing(error):
    def write(folder):
        raise error

    return write


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(saver_module, "FIRST_PAUSE", 0.05)


def test_a_failed_save_is_told_once_with_the_path_the_cause_the_advice_and_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    saver = Saver(tmp_path)
    assert save(saver, 1) == ""
    monkeypatch.setattr(integrity, "write_manifest", failing(FULL))
    said = save(saver, 2)
    assert said.startswith(f"step 2 could not be saved in {tmp_path}: No space left on device (a checkpoint has up to ")
    assert said.endswith(f"MB are free): free some space there; the last good checkpoint is {tmp_path}/1")
    assert saver.failure() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]  # the room is given back
    monkeypatch.undo()
    assert save(saver, 3) == "" and integrity.steps(tmp_path) == [1, 3]


def test_a_failure_does_not_hold_up_the_steps_and_is_tried_again_at_ever_longer_intervals(tmp_path, monkeypatch):
    saver, release = Saver(tmp_path), threading.Event()

    def slowly(folder):
        release.wait(10)
        raise FULL

    monkeypatch.setattr(integrity, "write_manifest", slowly)
    saver.save(1, ITEMS, lambda: {"step": 1})
    assert saver.failure() == "" and not saver.due()  # under way
    release.set()
    assert "could not be saved" in saver.failure(wait=True)
    pauses = [saver.pause]
    for step in range(2, 5):
        assert "could not be saved" in save(saver, step)
        pauses.append(saver.pause)
    assert pauses == [0.05, 0.1, 0.2, 0.4]
    monkeypatch.setattr(integrity, "write_manifest", failing(OSError(errno.EROFS, os.strerror(errno.EROFS))))
    assert "Read-only file system, make it writable" in save(saver, 5)
    assert saver.pause == 0.05  # another cause
    threading.Event().wait(0.06)
    assert saver.due()
    monkeypatch.undo()
    assert save(saver, 6) == "" and not saver.due()


def test_what_cannot_be_written_beside_a_checkpoint_fails_the_save_and_not_the_run(tmp_path):
    saver = Saver(tmp_path)

    def meta():
        raise FULL

    saver.save(1, ITEMS, meta)
    assert "No space left on device" in saver.failure()


def test_whoever_does_not_ask_is_told_of_a_failure_by_the_next_save_or_wait(tmp_path, monkeypatch):
    saver = Saver(tmp_path)
    monkeypatch.setattr(integrity, "write_manifest", failing(FULL))
    for surface in (saver.wait, lambda: saver.save(3, ITEMS, dict)):
        saver.save(2, ITEMS, lambda: {"step": 2})
        with pytest.raises(OSError, match=r"step 2 could not be saved in .*No space left on device"):
            surface()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root may mount a small disk")
def test_orbax_on_a_disk_that_is_really_full_prints_nothing_of_its_own(tmp_path, capfd):
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("this machine does not let root mount a disk")
    try:
        saver = Saver(tmp_path / "run")
        assert save(saver, 1) == ""
        (tmp_path / "full").write_bytes(b"x" * shutil.disk_usage(tmp_path).free)
        assert "No space left on device" in save(saver, 2)
        assert integrity.newest_intact(tmp_path / "run") == 1
        (tmp_path / "full").unlink()
        assert save(saver, 3) == "" and integrity.newest_intact(tmp_path / "run") == 3
    finally:
        os.system(f"umount {tmp_path}")
    assert capfd.readouterr() == ("", "")


def test_what_was_measured_waits_for_a_disk_with_room_and_costs_no_step(tmp_path, monkeypatch, capsys):
    saver = Saver(tmp_path)
    save(saver, 1)
    monkeypatch.setattr(saver_module, "write_atomically", lambda *_: (_ for _ in ()).throw(FULL))
    saver.add_to_meta(1, {"val_bpb": 1.5})
    saver.close()
    assert "WARNING: what was measured of step 1 could not be written" in capsys.readouterr().out
    monkeypatch.undo()
    saver.close()
    assert (tmp_path / "1" / "measured.json").read_text() == '{"val_bpb": 1.5}'


def test_all_of_a_checkpoint_is_on_the_disk_before_the_one_before_it_goes(tmp_path, monkeypatch):
    """Also its folders: else a power cut could leave neither."""
    saver, synced = Saver(tmp_path, keep=1), set()
    save(saver, 1)
    fsync, discard, seen = os.fsync, integrity.discard, []

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def look(folder):
        step = tmp_path / "2"
        seen.append(folder.name)
        for path in (tmp_path, step, *step.rglob("*")):
            assert path.stat().st_ino in synced, path
        discard(folder)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(integrity, "discard", look)
    assert save(saver, 2) == "" and seen == ["1"] and integrity.steps(tmp_path) == [2]


def test_a_checkpoint_is_hashed_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "THREADS", 3)
    save(Saver(tmp_path), 1)
    threads, open_file, meet = set(), type(tmp_path).open, threading.Barrier(3, timeout=10)

    def note(path, *args, **mode):
        if path.name != integrity.MANIFEST and len(threads) < 3:
            threads.add(threading.get_ident())
            meet.wait()  # passes only if three threads read at a time
        return open_file(path, *args, **mode)

    monkeypatch.setattr(type(tmp_path), "open", note)
    assert integrity.is_intact(tmp_path / "1") and len(threads) == 3


def test_of_several_processes_one_hashes_and_tells_the_others(tmp_path, monkeypatch):
    save(Saver(tmp_path), 1)
    monkeypatch.setattr(integrity.processes, "index", lambda: 1)
    monkeypatch.setattr(integrity.processes, "exchange", lambda what, value: [True, value])
    monkeypatch.setattr(integrity, "_digests", None)
    assert integrity.is_intact(tmp_path / "1")


# ------------------------------------------------------------------------------------------------ whose folder it is
def test_a_lock_file_that_was_deleted_is_taken_again_unless_another_run_has_come(tmp_path):
    first = own(tmp_path)
    assert isinstance(first, Lock)
    first.check()
    (tmp_path / ownership.LOCK).unlink()
    first.check()
    with pytest.raises(ownership.Timeout):
        own(tmp_path)
    (tmp_path / ownership.LOCK).unlink()
    second = own(tmp_path)
    with pytest.raises(FolderLost, match=rf"another run has started in {tmp_path}: this one has lost it"):
        first.check()
    second.check()
    second.release()
    with pytest.raises(FolderLost):  # what the second run has written is there, although it has ended
        first.check()
    first.release()


def test_a_folder_that_was_deleted_ends_the_run_with_a_sentence(tmp_path):
    folder = tmp_path / "run"
    owner = own(folder)
    shutil.rmtree(folder)
    with pytest.raises(FolderLost, match=r"run was deleted while this run trained in it"):
        owner.glance()
    assert not folder.exists()


def test_where_there_are_no_locks_the_run_that_started_last_has_the_folder(tmp_path, monkeypatch):
    def without_locks(path):
        raise NotImplementedError

    monkeypatch.setattr(ownership, "FileLock", without_locks)
    first = own(tmp_path)
    first.check()
    second = own(tmp_path)
    assert isinstance(second, Token)
    first.glance()  # the last look is not long ago
    monkeypatch.setattr(ownership, "GLANCE_SECONDS", -1.0)
    with pytest.raises(FolderLost):
        first.glance()
    second.glance()


def test_a_run_that_has_lost_its_folder_seals_and_deletes_nothing(tmp_path, monkeypatch):
    owner = own(tmp_path)
    saver = Saver(tmp_path, 1, owner)
    save(saver, 1)
    check, lost = owner.check, threading.Event()

    def late_in_the_thread():
        if threading.current_thread().name == "checkpoint":
            lost.wait(10)
        check()

    monkeypatch.setattr(owner, "check", late_in_the_thread)
    saver.save(2, ITEMS, lambda: {"step": 2})
    (tmp_path / ownership.LOCK).unlink()
    other = own(tmp_path)
    lost.set()
    assert saver.failure(wait=True) == "" and integrity.steps(tmp_path) == [1]
    with pytest.raises(FolderLost):
        saver.save(3, ITEMS, dict)
    with pytest.raises(FolderLost):
        saver.glance()
    other.release()
