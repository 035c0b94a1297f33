"""Records that are in memory: lists of dictionaries or texts, tables, and `datasets` data sets."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from upriver.errors import CorpusError
from upriver.runtime.artifact import new_digest
from upriver.text.folders import one_split
from upriver.text.records import dump, jsonable
from upriver.text.sources import Source


@dataclass
class InMemory(Source):
    """A source whose rows are given."""

    @property
    def files(self) -> list[Path]:
        return []

    @property
    def form(self) -> list[Any]:
        """The hash of its rows."""
        content = new_digest()
        for row in self.data:
            content.update(dump(jsonable(row)))
        return [content.hexdigest()]


def source_of(given: Any, split: str | None) -> Source:
    """What is read of records in memory.

    Raises:
        CorpusError: it is something else, or has several splits of which none is named.
    """
    if isinstance(given, pd.DataFrame):
        given = given.to_dict("records")
    if isinstance(given, str | bytes | Path) or not isinstance(given, Iterable):
        raise CorpusError(
            f"not records: got {given!r:.60}; give a list of dictionaries or texts, or a datasets.Dataset, or read files "
            "with Corpus.read"
        )
    module = type(given).__module__.partition(".")[0]
    if module == "datasets":
        import datasets

        given = one_split(given, split)
        if isinstance(given, datasets.Dataset):
            return Source(Path("dataset"), "dataset", "dataset", data=given)
    rows = [_row(x) for x in given]
    if not rows:
        raise CorpusError("the corpus is empty: got no records; give at least one")
    return InMemory(Path("records"), "records", "memory", data=rows)


def _row(given: Any) -> Any:
    if isinstance(given, str):
        return {"text": given}
    return given if isinstance(given, dict) else f"not a record: got {given!r:.60}; give dictionaries or texts"
