"""JAX's cache of compiled programs on disk: where it is, and what becomes of an entry that is damaged."""

import functools
import os
import re
import shutil
import warnings
import zlib
from typing import Any

import jax
from jax._src import compilation_cache

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import output_dir

FAILED = r"(?s)Error (reading|writing) persistent compilation cache entry for '([^']+)': (.*)"  # a warning of JAX's


def keep_compiled_programs() -> None:
    """Turn the cache on, in JAX_COMPILATION_CACHE_DIR or the base directory. A program that it cannot give back is
    compiled anew, which a line of the console tells, and its damaged entry is deleted: JAX itself would keep it."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # where the user wants it
        jax.config.update("jax_compilation_cache_dir", str(output_dir() / "compilation_cache"))
    # JAX compresses with zstd where Python has it, without a checksum: of 60 entries with a flipped bit it took 23;
    # one of them ended the process, another changed the result. zlib's checksum found all of 30.
    compilation_cache.zstd = compilation_cache.zstandard = None
    warnings.filterwarnings("always", FAILED)  # also of a second program with the same name and damage
    if getattr(warnings.showwarning, "func", None) is not _show_warning:
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)


def _show_warning(show: Any, message: Any, category: Any, *place: Any) -> None:
    """Python's way to show a warning, but for those of the cache; show: what is called for all others."""
    failed = re.match(FAILED, str(message))
    if not failed:
        show(message, category, *place)
        return
    act, program, error = failed.groups()
    _delete_damaged(program)
    reason = " ".join(error.split())[:200]
    print0(f"NOTE: {act} the compiled program {program} in the compilation cache failed, it is compiled anew: {reason}")


def _delete_damaged(program: str) -> None:
    try:
        for entry in bucket.as_path(jax.config.jax_compilation_cache_dir).iterdir():
            if entry.name.startswith(f"{program}-") and entry.name.endswith("-cache"):
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif not _is_whole(entry):
                    entry.unlink()
    except OSError:  # then the line comes again with the next run
        pass


def _is_whole(entry: Any) -> bool:
    try:
        zlib.decompress(entry.read_bytes())
    except zlib.error:
        return False
    return True
