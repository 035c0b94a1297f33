"""The finished results of a trace, read back."""

import html
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq

from upriver.errors import ConfigError, QueryError
from upriver.show.data import SIDES
from upriver.show.export import export
from upriver.show.folder import UNSAFE, read_columns, read_results, read_table
from upriver.show.groups import by_group
from upriver.show.report import write_report

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN, BEST = 8, 3  # questions in a notebook, and passages of each


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

    def by(self, field: str, **given: Any) -> pd.DataFrame:
        """Sums over the groups of documents that a field of their records makes; see `by_group`."""
        return by_group(self.path, field, **given)

    def to_dataset(self, of: str = "records", corpus: str | Path | None = None) -> "Dataset":
        """The results as a ``datasets.Dataset``.

        Args:
            of: ``records``: your own, every field kept, with ``influence:ID`` for each question, as `export` writes them;
                ``sequences`` or ``documents``: the tables `frame` and `documents`, of raw scores.
            corpus: where the records are now; None: where the trace read them.

        Raises:
            ConfigError: another ``of``, or fields that hold several types.
            MismatchError: the records are not those that were scored.
            InputError: there are no records: the results are not of a corpus of text.

        Example:
            >>> up.Scores("scores").to_dataset().sort("influence:q1", reverse=True)[:10]["text"]
        """
        from datasets import Dataset  # takes a second to load
        from datasets.table import InMemoryTable

        tables = {"sequences": "scores.parquet", "documents": "documents.parquet"}
        if of == "records":
            with tempfile.TemporaryDirectory() as folder:
                place = export(self.path, Path(folder) / "records.parquet", corpus=corpus)
                return Dataset(InMemoryTable(pq.read_table(place)))
        if of not in tables:
            raise ConfigError(f"no such rows: got {of!r}; records, sequences or documents")
        table = read_table(self.path / tables[of], None)
        assert table is not None
        return Dataset(InMemoryTable(table))

    def _repr_html_(self) -> str:
        """The best passages of the first questions, in a notebook; texts are escaped."""
        unit = "raw" if self.manifest["damping"] == "none" else "nats"
        parts = [f"<p><b>{self._told()}</b></p>"]
        for query in self.queries[:SHOWN]:
            asked = "".join(f"<bdi>{_shown(query.get(key), 200)}</bdi>" for key in ("prompt", "completion"))
            rows = [
                f"<tr><td>{x['rank']}</td><td>{_nats(x):+.3g}</td><td><bdi>{_shown(x['document'], 60)}</bdi></td>"
                f'<td style="text-align:left"><bdi>{_shown(x["text"], 240)}</bdi></td></tr>'
                for x in self.top(query["id"], BEST).to_dict("records")
            ]
            head = f"<tr><th></th><th>{unit}</th><th>document</th><th>passage</th></tr>"
            parts.append(f"<p>{_shown(query['id'], 60)}: {asked}</p><table>{head}{''.join(rows)}</table>")
        return "\n".join(parts)

    def _told(self) -> str:
        what = f"{len(self.queries):,} questions, {self.manifest.get('scored_sequences') or 0:,} sequences"
        return f"{what}; the {BEST} best passages of {'each' if len(self.queries) <= SHOWN else f'the first {SHOWN}'}"

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report page (and its JSON, JSONL and CSV beside it); returns the page's path."""
        return write_report(self.path, None if out is None else Path(out))


def _shown(value: Any, most: int) -> str:
    """The beginning of a text, with nothing in it that HTML takes for more than text."""
    text = UNSAFE.sub(" ", value if isinstance(value, str) else "" if value is None else str(value))
    return html.escape(text if len(text) <= most else text[:most] + "…")


def _nats(row: dict[Any, Any]) -> float:
    """The first of these that is known: a column without numbers holds NaN or None."""
    known = (float(row.get(key) or "nan") for key in ("calibrated_nats", "score_nats"))
    return next((x for x in known if not math.isnan(x)), float(row["score"]))
