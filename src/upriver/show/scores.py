"""The finished results of a trace, read back."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from upriver.errors import QueryError
from upriver.runtime.artifact import read_json
from upriver.show.data import SIDES
from upriver.show.folder import Json, read_manifest
from upriver.show.report import write_report


class Scores:
    """The finished results of a folder.

    Example:
        >>> result = up.Scores("scores")
        >>> result.top("q1", 10)  # a pandas frame, most positive first

    Raises:
        InputError: the folder holds no finished trace.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest: Json = read_manifest(self.path)
        self.queries: list[Json] = read_json(self.path / "queries.json")

    def top(self, query: str, k: int = 10, side: str = "positive") -> pd.DataFrame:
        """The ``k`` most ``positive`` or ``negative`` sequences of a query, by their full-rank scores.

        Raises:
            QueryError: no such query, or no such side.
        """
        known = [q["id"] for q in self.queries]
        if query not in known:
            raise QueryError(f"no such query: got {query!r}; the results have {', '.join(known)}")
        if side not in SIDES:
            raise QueryError(f"no such side: got {side!r}; {' or '.join(SIDES)}")
        with open(self.path / "top.parquet", "rb") as file:
            table = pq.read_table(file, filters=[("query", "=", query), ("side", "=", side)])
        return table.to_pandas().sort_values("rank").head(k).reset_index(drop=True)

    def frame(self) -> pd.DataFrame:
        """Every scored sequence, a column of raw scores per query."""
        return self._table("scores")

    def documents(self) -> pd.DataFrame:
        """Every document that has a scored sequence, a column of the sums over its scored sequences per query."""
        return self._table("documents")

    def _table(self, name: str) -> pd.DataFrame:
        with open(self.path / f"{name}.parquet", "rb") as file:  # arrow does not take every path
            return pd.read_parquet(file)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report page (and its JSON, JSONL and CSV beside it); returns the page's path."""
        return write_report(self.path, None if out is None else Path(out))
