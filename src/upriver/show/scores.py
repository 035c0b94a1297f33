"""The finished results of a trace, read back."""

from pathlib import Path

import pandas as pd

from upriver.errors import QueryError
from upriver.show.data import SIDES
from upriver.show.folder import read_columns, read_results
from upriver.show.report import write_report


class Scores:
    """The finished results of a folder.

    Example:
        >>> result = up.Scores("scores")
        >>> result.top("q1", 10)  # a pandas frame, most positive first

    Raises:
        InputError: the folder holds no finished trace, or a file of it is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest, self.queries = read_results(self.path)

    def top(self, query: str, k: int = 10, side: str = "positive", unit_norm: bool = False) -> pd.DataFrame:
        """The ``k`` most ``positive`` or ``negative`` sequences of a query, by their full-rank scores.

        Args:
            unit_norm: by the unit-norm scores of the scan, of all sequences: ``sequence``, ``document``, ``start``, ``end``,
                ``score`` and ``unit``, best first.

        Raises:
            QueryError: no such query, no such side, or a trace without unit-norm scores.
        """
        known = [q["id"] for q in self.queries]
        if query not in known:
            raise QueryError(f"no such query: got {query!r}; the results have {', '.join(known)}")
        if side not in SIDES:
            raise QueryError(f"no such side: got {side!r}; {' or '.join(SIDES)}")
        if unit_norm:
            return self._top_of_unit_norm(query, k, side)
        found = read_columns(self.path / "top.parquet", None, filters=[("query", "=", query), ("side", "=", side)])
        return found.sort_values("rank").head(k).reset_index(drop=True)

    def _top_of_unit_norm(self, query: str, k: int, side: str) -> pd.DataFrame:
        found, column = self.frame(), f"{query}@unit"
        if column not in found:
            raise QueryError(f"no unit-norm scores of {query!r} in {self.path}: trace again with --unit-norm")
        places = {name: found[name] for name in ("sequence", "document", "start", "end")}
        table = pd.DataFrame({**places, "score": found[query], "unit": found[column]})
        table = table.loc[table["unit"] > 0 if side == "positive" else table["unit"] < 0]
        return table.sort_values(by="unit", ascending=side != "positive", kind="stable").head(k).reset_index(drop=True)

    def frame(self) -> pd.DataFrame:
        """Every scored sequence, a column of raw scores per query."""
        return read_columns(self.path / "scores.parquet", None)

    def documents(self) -> pd.DataFrame:
        """Every document that has a scored sequence, a column of the sums over its scored sequences per query."""
        return read_columns(self.path / "documents.parquet", None)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report page (and its JSON, JSONL and CSV beside it); returns the page's path."""
        return write_report(self.path, None if out is None else Path(out))
