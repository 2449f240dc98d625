"""Rows of Parquet files, batch by batch; needs `pyarrow`, which is imported when a file is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inranker_jax.corpora.malformed import BadRow
from inranker_jax.corpora.rows import DOCUMENT_ID, DOCUMENT_TEXT, QUERY_ID, QUERY_TEXT, TITLE, Fields
from inranker_jax.errors import InputError
from inranker_jax.records import PathType, open_raw

_BATCH = 1024
_NAMES = frozenset((*DOCUMENT_ID, *DOCUMENT_TEXT, *TITLE, *QUERY_ID, *QUERY_TEXT))


class _NotUtf8:
    """Stands for a string that is not UTF-8, which Arrow stores unchecked."""


class ParquetRows:
    """The rows of one Parquet file, of the columns that have a known name only."""

    def __init__(self, path: PathType):
        self.path = path

    def rows(self) -> Iterator[tuple[int, int, Fields]]:
        """As in `RowSource`; the number is that of the row, from 1, and the offset is always 0.

        Raises:
          InputError: `pyarrow` is not installed, the file is no whole Parquet file, or it has no column of a
            known name.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise InputError.at(
                self.path, None, "Parquet files need the 'pyarrow' package, which is not installed",
                remedy="Run `pip install 'inranker_jax[label]'`",
            ) from error  # fmt: skip
        with open_raw(self.path) as raw:
            try:
                # Buffering ahead would hold the whole file.
                file = pq.ParquetFile(raw, pre_buffer=False)
                names = [name for name in file.schema_arrow.names if name in _NAMES]
                if not names:
                    raise InputError.at(
                        self.path, None, f"no column of a known name among {file.schema_arrow.names}",
                        "an id ('_id', 'id', 'doc_id', ...) and a text ('text', 'contents', ...)",
                        "Rename the columns",
                    )  # fmt: skip
                number = 0
                for batch in file.iter_batches(batch_size=_BATCH, columns=names):
                    columns = [_values(column) for column in batch.columns]
                    for values in zip(*columns, strict=True):
                        number += 1
                        yield number, 0, dict(zip(batch.schema.names, values, strict=True))
            except (pa.ArrowException, OSError) as error:
                raise InputError.at(
                    self.path,
                    None,
                    f"not a whole Parquet file ({error})",
                    "",
                    "Write or fetch the file again",
                ) from error

    def fields(self, raw: Fields) -> Fields:
        """As in `RowSource`."""
        for name, value in raw.items():
            if isinstance(value, _NotUtf8):
                raise BadRow("encoding", f"column {name!r} is not UTF-8", "UTF-8 text")
        return raw


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NotUtf8()
