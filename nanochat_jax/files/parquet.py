"""Parquet files through pyarrow: rows counted from the footers, columns read, and faults that name the file."""

import bisect
import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path


def read_footer(path: Path):
    """pyarrow's FileMetaData of a parquet file. ValueError, with the path: damaged, or no parquet file."""
    import pyarrow.parquet as pq

    with _named(path):
        return pq.read_metadata(path)


def count_rows(files: list[Path], columns: tuple[str, ...]) -> int:
    """Rows of all files, from their footers. ValueError: a damaged file, or one without a column or with two of it."""
    total = 0
    for path in files:
        footer = read_footer(path)
        present = footer.schema.to_arrow_schema().names
        if missing := [c for c in columns if c not in present]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(sorted(set(present)))}")
        if repeated := [c for c in columns if present.count(c) > 1]:
            raise ValueError(f"{path} must have one column {repeated[0]}, it has {present.count(repeated[0])}")
        total += footer.num_rows
    return total


def read_files(files: list[Path], columns: tuple[str, ...]):
    """pyarrow Table of these columns of the files, one after the other. ValueError as count_rows, and other types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count_rows(files, columns)  # its message names a missing column
    tables = []
    for path in files:
        with _named(path):
            table = pq.read_table(path, columns=list(columns), memory_map=True)
            tables.append(table.replace_schema_metadata(None))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"the parquet files of {files[0].parent} do not fit together: {first_line(e)}") from e


class ParquetRows:
    """The rows of parquet files, one after the other, as dictionaries of these columns.

    They stay in Arrow until they are asked for; making this reads the footers only."""

    def __init__(self, files: list[Path], columns: tuple[str, ...]):
        """ValueError as count_rows."""
        self.files, self.columns = files, columns
        self._size = count_rows(files, columns)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> dict:
        """ValueError: as `batches`, or a text is not UTF-8, which Arrow does not check."""
        batches, starts = self.batches
        i = bisect.bisect_right(starts, row) - 1
        return {name: column[row - starts[i]].as_py() for name, column in batches[i]}

    @functools.cached_property
    def batches(self) -> tuple[list[list[tuple]], list[int]]:
        """(column name, Arrow array) pairs of every record batch, and the number of each batch's first row; read when
        they are first asked for. ValueError: the files are damaged."""
        batches = [b for b in read_files(self.files, self.columns).to_batches() if b.num_rows]
        starts = [0, *itertools.accumulate(b.num_rows for b in batches)]
        return [[(name, b.column(name)) for name in self.columns] for b in batches], starts


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path} is not a readable parquet file: {first_line(e)}") from e


def first_line(e: BaseException) -> str:
    """An exception's message as it fits into a sentence."""
    return (str(e).splitlines() or [type(e).__name__])[0][:200]
