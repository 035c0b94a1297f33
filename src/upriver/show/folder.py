"""Reading a SCORES folder: the result of ``upriver trace``, as far as it is there."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from upriver.errors import InputError, StorageError
from upriver.evaluate.verified import read_verified
from upriver.runtime.artifact import TraceManifest, check, read_head, read_json, unreadable
from upriver.runtime.config import PLAIN_GRADIENTS

Json = dict[str, Any]
AGAIN, GIVE = "run `upriver trace` again with --overwrite", "give the folder that `upriver trace` wrote"
# Control characters and those that reorder text: corpus text must not steer a terminal.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SPAN = ["sequence", "document", "start", "end"]


def corpus_name(told: Json) -> str | None:
    """What a corpus is called: its file or folder, or several."""
    path = told.get("path") or []
    paths = path if isinstance(path, list) else [path]
    return ", ".join(str(x).rstrip("/").rsplit("/", 1)[-1] for x in paths) or None


class Top:
    """``top.parquet``, as Arrow holds it: rows become Python objects when they are asked for, a query and a side at a time."""

    def __init__(self, table: pa.Table):
        self.table = table
        small = table.select(["query", "side", "rank"]).to_pandas()
        small = small.assign(query=small["query"].astype(str)).sort_values("rank", kind="stable")
        groups: Any = small.groupby(["query", "side"], sort=False).indices
        self._rows = {key: small.index.to_numpy()[at] for key, at in groups.items()}

    def rows(self, query: str, side: str, most: int | None = None) -> list[Json]:
        """The best ``most`` passages of a side, by rank; lists of numbers are arrays."""
        rows = self._rows.get((query, side), np.empty(0, np.int64))[:most]
        if not len(rows):
            return []
        part = self.table.slice(rows.min(), rows.max() - rows.min() + 1).take(pa.array(rows - rows.min()))
        numbers = [x.name for x in part.schema if pa.types.is_list(x.type) and pa.types.is_floating(x.type.value_type)]
        found = part.drop_columns(numbers).to_pylist()
        for name in numbers:
            for row, value in zip(found, part[name], strict=True):
                row[name] = np.empty(0) if value.values is None else value.values.to_numpy(zero_copy_only=False)
        return found

    def count(self, most: int) -> int:
        """The tokens of the passages up to a rank."""
        if "tokens" not in self.table.column_names:
            return 0
        lists = self.table.filter(pc.field("rank") <= most)["tokens"]
        return sum(int(np.diff(chunk.offsets).sum()) for chunk in lists.chunks)


class Folder(NamedTuple):
    """What ``upriver trace`` wrote; parts that a run did not write are empty."""

    path: Path
    manifest: Json
    queries: list[Json]
    top: Top
    verified: tuple[Json, pd.DataFrame] | None = None  # what `upriver verify` found

    @property
    def n_train(self) -> int | None:
        """The number of training sequences that turns a raw score into nats; None for gradient dot products."""
        return None if self.manifest.get("curvature") in PLAIN_GRADIENTS else self.manifest.get("n_train")

    def documents(self, ids: list[str]) -> pd.DataFrame:
        """``document, sequences`` and the sums of some queries for every document; empty when there are none."""
        return read_columns(self.path / "documents.parquet", ["document", "sequences", *ids])

    def spans(self) -> pd.DataFrame:
        """``sequence, document, start, end`` of every scored sequence."""
        return read_columns(self.path / "scores.parquet", SPAN)

    def scores(self, ids: list[str]) -> pd.DataFrame:
        """The raw scores of all sequences for some queries, in the order of ``spans()``; empty when there are none."""
        return read_columns(self.path / "scores.parquet", ids)


def read_folder(path: Path) -> Folder:
    """Read the folder that ``upriver trace`` wrote.

    Raises:
        InputError: it is not such a folder, the trace is not finished, or a file in it cannot be read.
    """
    path = Path(path)
    manifest, queries = read_results(path)
    top = read_table(path / "top.parquet", None)
    if top is None or not {"query", "side", "rank", "score"} <= set(top.column_names):
        raise InputError(f"no ranked passages in the results: got {path / 'top.parquet'}; run the trace again")
    with _told():
        return Folder(path, manifest, queries, Top(top), read_verified(path))


def read_results(path: Path) -> tuple[Json, list[Json]]:
    """The manifest and the queries of a finished trace, their checksums and structure verified.

    Raises:
        InputError: as ``read_folder``.
    """
    with _told():
        try:
            there = path.is_dir()
            manifest, begun = ((path / name).exists() for name in ("manifest.json", "key.json"))
        except (OSError, ValueError) as error:  # a folder above it that is closed, or what can be no path at all
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the folder of results: got {path} ({reason}); {GIVE}") from error
        if not there:
            raise InputError(f"no such folder of results: got {path}; {GIVE}")
        if not manifest:
            if begun or (path / "scores.parquet").exists():
                raise InputError(f"the trace is not finished: got {path}; give the same `upriver trace` command again")
            raise InputError(f"not a folder of results: got {path}; {GIVE}")
        foreign = f"not the result of a trace: got {path}; {GIVE}"
        if (path / "audit.parquet").exists():
            foreign = f"an audit is no trace: got {path}; its page is {path / 'audit.html'}, its trace, if any, {path / 'scores'}"
        found = read_head(path / "manifest.json", TraceManifest, foreign, AGAIN)
        missing = [name for name in found["files"] if not (path / name).exists()]
        if missing:
            raise InputError(f"the results are not complete: {path} has no {missing[0]}; {AGAIN}")
        check(path / "queries.json", AGAIN)
        queries = read_json(path / "queries.json")
        if not isinstance(queries, list) or not queries or not all(isinstance(x, dict) and "id" in x for x in queries):
            raise InputError(f"no queries in the results: got {path / 'queries.json'}; trace at least one query")
        return found, queries


def read_columns(path: Path, columns: list[str] | None, **how: Any) -> pd.DataFrame:
    """The columns of a Parquet file that are there; an empty frame when the file is not."""
    found = read_table(path, columns, **how)
    return pd.DataFrame() if found is None else found.to_pandas()


def read_table(path: Path, columns: list[str] | None, **how: Any) -> pa.Table | None:
    """The same as Arrow holds it; None when the file is not there."""
    with _told():
        if not path.exists():
            return None
        check(path, AGAIN)
        try:
            with open(path, "rb") as raw:  # arrow does not take every path
                names = pq.read_schema(raw).names
                wanted = None if columns is None else [name for name in columns if name in names]
                return pq.read_table(raw, columns=wanted, **how)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error, AGAIN) from error


@contextmanager
def _told() -> Iterator[None]:
    """What cannot be read of a folder is the fault of what was given."""
    try:
        yield
    except StorageError as error:
        raise InputError(str(error)) from error


def metadata_of(value: Any) -> Json:
    """The record's further fields, from their JSON text."""
    try:
        fields = json.loads(value) if isinstance(value, str) and value else {}
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {"value": fields}
