"""Reading a SCORES folder: the result of ``upriver trace``, as far as it is there."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import InputError
from upriver.runtime.artifact import read_json

Json = dict[str, Any]
SPAN = ["sequence", "document", "start", "end"]


class Folder(NamedTuple):
    """What ``upriver trace`` wrote; parts that a run did not write are empty."""

    path: Path
    manifest: Json
    queries: list[Json]
    top: pd.DataFrame

    @property
    def n_train(self) -> int | None:
        """The number of training sequences that turns a raw score into nats; None for gradient dot products."""
        return None if self.manifest.get("curvature") == "identity" else self.manifest.get("n_train")

    def documents(self, query_id: str) -> pd.DataFrame:
        """``document, sequences`` and the sum of one query for every document; empty when there are none."""
        return _columns(self.path / "documents.parquet", ["document", "sequences", query_id])

    def spans(self) -> pd.DataFrame:
        """``sequence, document, start, end`` of every scored sequence."""
        return _columns(self.path / "scores.parquet", SPAN)

    def scores(self, query_id: str) -> np.ndarray:
        """The raw scores of all sequences for one query, in the order of ``spans()``; empty when there are none."""
        frame = _columns(self.path / "scores.parquet", [query_id])
        return frame[query_id].to_numpy(np.float64) if query_id in frame else np.empty(0)


def read_folder(path: Path) -> Folder:
    """Read the folder that ``upriver trace`` wrote.

    Raises:
        InputError: it is not such a folder, the trace is not finished, or a file in it cannot be read.
    """
    path = Path(path)
    manifest = read_manifest(path)
    queries = _json(path / "queries.json")
    if not isinstance(queries, list) or not queries:
        raise InputError(f"no queries in the results: got {path / 'queries.json'}; trace at least one query")
    top = _columns(path / "top.parquet", None)
    if not {"query", "side", "rank", "score"} <= set(top.columns):
        raise InputError(f"no ranked passages in the results: got {path / 'top.parquet'}; run the trace again")
    return Folder(path, manifest, queries, top)


def read_manifest(path: Path) -> Json:
    """The manifest of a finished trace.

    Raises:
        InputError: as ``read_folder``.
    """
    try:
        return _manifest(path)
    except OSError as error:  # a name that is too long, a folder above it that is closed
        raise InputError(
            f"cannot read the folder of results: got {path} ({error.strerror}); give the folder that `upriver trace` wrote"
        ) from error


def _manifest(path: Path) -> Json:
    if not path.is_dir():
        raise InputError(f"no such folder of results: got {path}; give the folder that `upriver trace` wrote")
    if not (path / "manifest.json").exists():
        if (path / "key.json").exists() or (path / "scores.parquet").exists():
            raise InputError(f"the trace is not finished: got {path}; give the same `upriver trace` command again")
        raise InputError(f"not a folder of results: got {path}; give the folder that `upriver trace` wrote")
    manifest = _json(path / "manifest.json")
    stage = manifest.get("stage") if isinstance(manifest, dict) else None
    stage = stage or (manifest.get("key") or {}).get("stage") if isinstance(manifest, dict) else stage
    missing = [name for name in ("queries.json", "top.parquet") if not (path / name).exists()]
    if not isinstance(manifest, dict) or (stage or "trace") != "trace" or (missing and not stage):
        raise InputError(
            f"not the result of a trace: got {path} of stage {stage!r}; give the folder that `upriver trace` wrote"
        )
    if missing:
        raise InputError(f"the results are not complete: {path} has no {missing[0]}; run `upriver trace` again")
    return manifest


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except Exception as error:
        raise InputError(f"cannot read {path}: {error.__cause__ or error}; run `upriver trace` again") from error


def _columns(path: Path, columns: list[str] | None) -> pd.DataFrame:
    """The columns of a Parquet file that are there; an empty frame when the file is not."""
    try:
        if not path.exists():
            return pd.DataFrame()
        with open(path, "rb") as raw, pq.ParquetFile(raw) as file:  # arrow does not take every path
            names = file.schema_arrow.names
            return file.read(None if columns is None else [name for name in columns if name in names]).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}; run `upriver trace` again") from error


def metadata_of(value: Any) -> Json:
    """The record's further fields, from their JSON text."""
    try:
        fields = json.loads(value) if isinstance(value, str) and value else {}
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {"value": fields}
