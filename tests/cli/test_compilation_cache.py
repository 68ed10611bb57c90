"""Damaged entries of the compilation cache: they are deleted and compiled anew, with one line on the console."""

import types
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache

from nanochat_jax.cli.compilation_cache import keep_compiled_programs
from nanochat_jax.cli.device import start_device


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache that is in use, though small programs are compiled in no time."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", MINIMUM)}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "zstandard", types.SimpleNamespace())  # as if it were installed
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update(MINIMUM, 0)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


MINIMUM = "jax_persistent_cache_min_compile_time_secs"


def compute() -> bytes:
    """What a small program gives, which is compiled, or read from the cache."""

    def small_program(x):
        return jnp.sum(jnp.tanh(x @ x) * jnp.cos(x), axis=0)

    return np.asarray(jax.jit(small_program)(np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16))).tobytes()


def entry_of(folder: Path) -> Path:
    (entry,) = folder.glob("jit_small_program-*-cache")
    return entry


def flip(entry, bit):
    data = bytearray(entry.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    entry.write_bytes(data)


def make_a_folder(entry):
    entry.unlink()
    entry.mkdir()
    (entry / "file").touch()


DAMAGE = {
    "empty": lambda entry: entry.write_bytes(b""),
    "cut": lambda entry: entry.write_bytes(entry.read_bytes()[:1000]),
    "a folder": make_a_folder,
    "of zstd": lambda entry: entry.write_bytes(b"\x28\xb5\x2f\xfd" + entry.read_bytes()),
    "a flipped bit": lambda entry: flip(entry, 8 * entry.stat().st_size // 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_told_in_a_line_deleted_and_compiled_anew(folder, capsys, damage):
    with warnings.catch_warnings():
        keep_compiled_programs()
        expected = compute()
        DAMAGE[damage](entry_of(folder))
        for said in (1, 0):  # the second time the entry is whole again
            capsys.readouterr()
            assert compute() == expected
            printed = capsys.readouterr()
            lines = [line for line in printed.out.splitlines() if "small_program" in line]
            assert len(lines) == said and all(line.startswith("NOTE: reading the compiled program") for line in lines)
            assert printed.err == ""
    zlib.decompress(entry_of(folder).read_bytes())


def test_no_flipped_bit_of_an_entry_is_run(folder):
    with warnings.catch_warnings():
        keep_compiled_programs()
        expected = compute()
        whole = entry_of(folder).read_bytes()
        for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 20).tolist():
            flip(entry_of(folder), bit)
            assert compute() == expected
            zlib.decompress(entry_of(folder).read_bytes())


def test_an_entry_that_is_whole_and_of_the_same_name_is_kept_and_other_warnings_are_shown(folder):
    with warnings.catch_warnings(record=True) as shown:
        start_device("auto")
        compute()
        (folder / "jit_small_program-other-cache").write_bytes(zlib.compress(b"another program"))
        next(folder.glob("jit_small_program-[!o]*-cache")).write_bytes(b"")
        compute()
        assert (folder / "jit_small_program-other-cache").exists()
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]
