"""Zip archives of others: a folder of one becomes a folder on this disk, whole, or nothing is written."""

import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

LARGEST_BYTES = 8 << 30  # unpacked, all members together
MOST_MEMBERS = 100_000


def unzip_folder(archive: Path, inside: str, target: Path) -> None:
    """Make `target`, which must not be there, of the folder `inside` of an archive; other members are left out.

    ValueError: it is no archive, has no such folder, is damaged, unpacks to more than LARGEST_BYTES or MOST_MEMBERS, or
    the path of a member leads out of the folder. OSError: `target` cannot be written."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if member.filename.startswith(f"{inside}/")]
            files = [member for member in members if not member.is_dir()]
            _check(files, inside)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
                for member in files:
                    path = Path(scratch, *PurePosixPath(member.filename).parts)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(member) as source, path.open("xb") as file:
                        shutil.copyfileobj(source, file)  # at most the size that was checked: zipfile sees to it
                Path(scratch, inside).rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:  # the last: encrypted
        raise ValueError(f"{archive.name} cannot be unpacked: {e}") from e


def _check(files: list[zipfile.ZipInfo], inside: str) -> None:
    if not files:
        raise ValueError(f"it must have a folder {inside}, with files in it")
    for member in files:
        parts = PurePosixPath(member.filename).parts
        if ".." in parts or "\\" in member.filename or ":" in member.filename:
            raise ValueError(f"the path of a file in it leads elsewhere: {member.filename!r:.100}")
    names = {member.filename.lower() for member in files}
    if len(names) < len(files):
        raise ValueError("a file is in it twice")
    size = sum(member.file_size for member in files)
    if size > LARGEST_BYTES or len(files) > MOST_MEMBERS:
        raise ValueError(
            f"it unpacks to {size:,} bytes in {len(files):,} files, at most {LARGEST_BYTES:,} and {MOST_MEMBERS:,} are "
            "taken"
        )
