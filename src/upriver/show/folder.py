"""Reading a SCORES folder: the result of ``upriver trace``, as far as it is there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import InputError, StorageError
from upriver.evaluate.verified import read_verified
from upriver.runtime.artifact import TraceManifest, check, read_head, read_json, unreadable
from upriver.runtime.config import PLAIN_GRADIENTS

Json = dict[str, Any]
AGAIN, GIVE = "run `upriver trace` again with --overwrite", "give the folder that `upriver trace` wrote"
SPAN = ["sequence", "document", "start", "end"]


def corpus_name(told: Json) -> str | None:
    """What a corpus is called: its file or folder, or several."""
    path = told.get("path") or []
    paths = path if isinstance(path, list) else [path]
    return ", ".join(str(x).rstrip("/").rsplit("/", 1)[-1] for x in paths) or None


class Folder(NamedTuple):
    """What ``upriver trace`` wrote; parts that a run did not write are empty."""

    path: Path
    manifest: Json
    queries: list[Json]
    top: pd.DataFrame
    verified: tuple[Json, pd.DataFrame] | None = None  # what `upriver verify` found

    @property
    def n_train(self) -> int | None:
        """The number of training sequences that turns a raw score into nats; None for gradient dot products."""
        return None if self.manifest.get("curvature") in PLAIN_GRADIENTS else self.manifest.get("n_train")

    def documents(self, query_id: str) -> pd.DataFrame:
        """``document, sequences`` and the sum of one query for every document; empty when there are none."""
        return read_columns(self.path / "documents.parquet", ["document", "sequences", query_id])

    def spans(self) -> pd.DataFrame:
        """``sequence, document, start, end`` of every scored sequence."""
        return read_columns(self.path / "scores.parquet", SPAN)

    def scores(self, query_id: str) -> np.ndarray:
        """The raw scores of all sequences for one query, in the order of ``spans()``; empty when there are none."""
        frame = read_columns(self.path / "scores.parquet", [query_id])
        return frame[query_id].to_numpy(np.float64) if query_id in frame else np.empty(0)


def read_folder(path: Path) -> Folder:
    """Read the folder that ``upriver trace`` wrote.

    Raises:
        InputError: it is not such a folder, the trace is not finished, or a file in it cannot be read.
    """
    path = Path(path)
    manifest, queries = read_results(path)
    top = read_columns(path / "top.parquet", None)
    if not {"query", "side", "rank", "score"} <= set(top.columns):
        raise InputError(f"no ranked passages in the results: got {path / 'top.parquet'}; run the trace again")
    with _told():
        return Folder(path, manifest, queries, top, read_verified(path))


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
    with _told():
        if not path.exists():
            return pd.DataFrame()
        check(path, AGAIN)
        try:
            with open(path, "rb") as raw:  # arrow does not take every path
                names = pq.read_schema(raw).names
                wanted = None if columns is None else [name for name in columns if name in names]
                return pq.read_table(raw, columns=wanted, **how).to_pandas()
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
