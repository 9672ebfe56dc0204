"""Parquet files read by the columns that are needed, of the types they are published with, or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path

FACTS = b"moe_artifacts"  # key of the JSON that says how a table was made
BATCH_ROWS = 262_144  # of a few columns: some tens of MB with prompts


def stream_columns(
    path: str | os.PathLike[str], types: Mapping[str, pa.DataType], batch_rows: int = BATCH_ROWS
) -> Iterator[pa.Table]:
    """The columns named by ``types``, cast to them, a part at a time.

    Args:
        types: Of the columns wanted; a column stored otherwise is cast if no value changes. The others are not read.
    Raises:
        InputError: If the file cannot be read, a column is missing, or a value does not fit its type.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in types if name not in file.schema_arrow.names]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}; its columns are {file.schema_arrow.names}")
            for batch in file.iter_batches(batch_rows, columns=list(types)):
                yield pa.table({name: _cast(batch.column(name), types[name], name, path) for name in types})
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error


def read_columns(path: str | os.PathLike[str], types: Mapping[str, pa.DataType]) -> pa.Table:
    """All parts of :func:`stream_columns` as one table."""
    schema = pa.schema(list(types.items()))
    return pa.concat_tables([schema.empty_table(), *stream_columns(path, types)])


def write_table(table: pa.Table, path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Write a Parquet file in one move, with ``facts`` as JSON in its metadata.

    Raises:
        InputError: If it cannot be written, say because the disk is full; what was there before is still there.
    """
    told = json.dumps(facts, allow_nan=False, sort_keys=True).encode()
    try:
        with atomic_path(path) as temporary:
            pq.write_table(table.replace_schema_metadata({FACTS: told}), temporary)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_table` was told of the table; empty for a file of other origin."""
    return dict(json.loads((pq.read_schema(Path(path)).metadata or {}).get(FACTS, b"{}")))


def _cast(column: pa.Array, kind: pa.DataType, name: str, path: str | os.PathLike[str]) -> pa.Array:
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_floating(column.type) and not pa.types.is_floating(kind):
            # pandas stores whole numbers as floats where some are missing.
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if not column.type.equals(kind):
            column = column.cast(kind)
        column.validate(full=True)  # a writer may have stored bytes that are no UTF-8
    except pa.ArrowException as error:
        raise InputError(
            f"column {name!r} of {path} must be of type {kind}, but holds {column.type}: {error}"
        ) from error
    return column
