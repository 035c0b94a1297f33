"""A query is an answer whose origin is asked for.

It has a prompt and a completion, and optionally a contrast: a second completion whose log-probability is subtracted.
Prompt and completion are tokenised as one text; a token belongs to the completion when it ends beyond the last character
of the prompt.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from upriver.errors import QueryError
from upriver.runtime.artifact import digest
from upriver.text.batch import Batch, pad, sequence_hash, sequence_keys
from upriver.text.shapes import half_pair
from upriver.text.sources import find_sources, json_rows
from upriver.text.tokenise import Encoded, encode, tokenizer_fingerprint

FIELDS = ("id", "prompt", "completion", "contrast")
RESERVED = ("sequence", "document", "part", "start", "end", "sequences")  # columns of the result's tables


@dataclass(frozen=True)
class Query:
    """A query as it was given has no ``completion`` while the model's own answer is still to be generated."""

    id: str
    prompt: str
    completion: str | None
    contrast: str | None
    where: str  # file and line, for messages
    generated: bool = False  # the completion is the model's own greedy answer


class Row(NamedTuple):
    """A row is one prompt with one completion, tokenised."""

    text: str
    encoded: Encoded
    loss_T: np.ndarray  # bool: completion tokens that have a context
    query: int
    weight: float  # +1 completion, -1 contrast


class Queries:
    """Queries are checked when they are read, and tokenised as soon as a tokenizer is known.

    Example:
        >>> queries = Queries.read("queries.jsonl", tokenizer, seq_len=512)
        >>> batch = queries.batch(np.array([0, 1]))

    Raises:
        QueryError: a query that cannot be used; the message names its file and line.
    """

    def __init__(self, records: Sequence[Query], tokenizer: PreTrainedTokenizerBase | None, seq_len: int | None = None):
        self.records = list(records)
        self._tokenizer = tokenizer
        self.seq_len = seq_len

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seq_len: int | None = None,
        complete: int | None = None,
    ) -> "Queries":
        """Read JSON lines (also ``.gz``, ``.xz``): ``id``, ``prompt``, ``completion``, optional ``contrast``.

        ``seq_len`` is the largest number of tokens a query may have.  With ``complete`` a query may lack its
        completion: it is then listed by ``needs_completion``, to be supplied by `completed`.  Without a tokenizer the
        queries are checked but not tokenised; `bound` does that later.
        """
        unbound = cls(_checked(_rows(Path(path)), str(path), complete), None, seq_len)
        return unbound if tokenizer is None else unbound.bound(tokenizer)

    @classmethod
    def of(
        cls,
        queries: Iterable[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        seq_len: int | None = None,
        complete: int | None = None,
    ) -> "Queries":
        """Do the same with dictionaries; those without an ``id`` are named ``q1``, ``q2``, ..."""
        rows = ((f"query {n}", {"id": f"q{n}", **query}) for n, query in enumerate(queries, 1))
        unbound = cls(_checked(rows, "the list of queries", complete), None, seq_len)
        return unbound if tokenizer is None else unbound.bound(tokenizer)

    def bound(self, tokenizer: PreTrainedTokenizerBase, seq_len: int | None = None) -> "Queries":
        """Give the queries a tokenizer; they are tokenised at once, so that one that cannot be used is named early."""
        queries = Queries(self.records, tokenizer, seq_len if seq_len is not None else self.seq_len)
        if not queries.needs_completion:
            queries.rows  # noqa: B018 - computed here for its errors
        return queries

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise QueryError("these queries have no tokenizer yet; give one to Queries.read, or call bound(tokenizer)")
        return self._tokenizer

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ids(self) -> list[str]:
        return [query.id for query in self.records]

    @property
    def needs_completion(self) -> list[int]:
        """Return the indices of the queries whose completion is still to be generated."""
        return [i for i, query in enumerate(self.records) if query.completion is None]

    def completed(self, answers: dict[str, str]) -> "Queries":
        """Return queries in which those named by id have the model's own answer as their completion.

        Raises:
            QueryError: an answer is empty, or no token of it can be scored.
        """
        records = []
        for query in self.records:
            given = answers.get(query.id)
            if given == "":
                what = f"{query.where}: the model's own answer to query {query.id!r} is empty"
                raise QueryError(f"{what}; give a completion yourself")
            records.append(query if given is None else dataclasses.replace(query, completion=given, generated=True))
        return Queries(records, None).bound(self.tokenizer, self.seq_len)

    def prompt_tokens(self, i: int) -> np.ndarray:
        """Return the tokens of a prompt, for the model to continue; a closing special token is left out."""
        encoded = encode(self.tokenizer, [self.records[i].prompt])[0]
        trailing = int(np.argmin(encoded.special_T[::-1])) if not encoded.is_empty else 0
        return encoded.tokens_T[: len(encoded.tokens_T) - trailing]

    @property
    def fingerprint(self) -> str:
        """Hash the queries and the tokenizer."""
        fields = [[q.id, q.prompt, q.completion, q.contrast] for q in self.records]
        return digest([fields, tokenizer_fingerprint(self.tokenizer)])

    @cached_property
    def rows(self) -> list[Row]:
        """Return the rows that go through the model: one per completion, one more per contrast, in query order."""
        if self.needs_completion:
            query = self.records[self.needs_completion[0]]
            raise QueryError(_no_completion(query.where, query.id))
        rows = []
        for index, query in enumerate(self.records):
            texts = ((query.completion, 1.0), (query.contrast, -1.0))
            rows += [self._row(index, text, weight) for text, weight in texts if text is not None]
        return rows

    def _row(self, index: int, completion: str, weight: float) -> Row:
        query = self.records[index]
        what = f"{query.where}: the {'completion' if weight > 0 else 'contrast'} of query {query.id!r}"
        text = query.prompt + completion
        encoded = encode(self.tokenizer, [text])[0]
        loss_T = encoded.ends_T > len(query.prompt)
        if not loss_T.any():
            raise QueryError(f"{what} has no token of its own: got {completion!r}; give it at least one more word")
        loss_T[0] = False
        if not loss_T.any():
            what += f" cannot be scored: its only token {completion!r} is the first of the text and has no context"
            raise QueryError(f"{what}; give a prompt, or a longer completion")
        if self.seq_len is not None and len(loss_T) > self.seq_len:
            what += f" is too long: got {len(loss_T)} tokens with its prompt, at most {self.seq_len} fit"
            raise QueryError(f"{what}; shorten the prompt")
        return Row(text, encoded, loss_T, index, weight)

    @cached_property
    def _rows_of_query(self) -> list[list[int]]:
        """Return the indices of the rows of each query."""
        found: list[list[int]] = [[] for _ in self.records]
        for r, row in enumerate(self.rows):
            found[row.query].append(r)
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Return how many tokens each query counts for, int32 ``[Q]``: its longest row, times the rows that a contrast makes it.

        In a batch all rows are padded to the longest, so no batch of these lengths holds more.
        """
        most = max(map(len, self._rows_of_query))
        return np.array([most * max(len(self.rows[r].loss_T) for r in rows) for rows in self._rows_of_query], np.int32)

    @cached_property
    def _keys(self) -> np.ndarray:
        hashes = [sequence_hash(row.encoded.tokens_T, row.loss_T) for row in self.rows]
        return sequence_keys(np.array(hashes, np.uint64))

    def batch(self, query_indices: Sequence[int] | np.ndarray) -> Batch:
        """Return all rows of the queries, in the order given: a completion with weight +1, then its contrast with -1."""
        rows = [r for q in query_indices for r in self._rows_of_query[int(q)]]
        picked = [self.rows[r] for r in rows]
        tokens, loss = [row.encoded.tokens_T for row in picked], [row.loss_T for row in picked]
        weight_N = torch.tensor([row.weight for row in picked])
        query_N = np.array([row.query for row in picked], np.int64)
        batch = pad(np.array(rows), self._keys[rows], tokens, loss)
        return dataclasses.replace(batch, weight_N=weight_N, query_N=query_N)

    def token_ids(self, i: int) -> np.ndarray:
        """Return the tokens of prompt, completion and contrast, as often as they occur, without added special tokens."""
        first, *contrast = (self.rows[r] for r in self._rows_of_query[i])
        parts = [first.encoded.tokens_T[~first.encoded.special_T]]
        parts += [row.encoded.tokens_T[row.loss_T] for row in contrast]
        return np.concatenate(parts)

    def completion_pieces(self, i: int, contrast: bool = False) -> list[str]:
        """Return the text of each scored token of the completion (or contrast), in the order of the row's loss mask."""
        row = self.rows[self._rows_of_query[i][1 if contrast else 0]]
        pieces = row.encoded.pieces(row.text)
        return [pieces[t] for t in np.flatnonzero(row.loss_T)]


def _rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for source in find_sources(path, QueryError):
        if source.kind != "jsonl":
            what = f"queries are JSON lines: got {source.path}"
            raise QueryError(f"{what}; give a .jsonl file, or .jsonl.gz or .jsonl.xz")
        for line, row in json_rows(source, QueryError):
            if isinstance(row, str):
                raise QueryError(f"{source.path}:{line}: {row}")
            yield f"{source.path}:{line}", row


def _checked(rows: Iterable[tuple[str, dict[str, Any]]], origin: str, complete: int | None) -> list[Query]:
    records: list[Query] = []
    seen: dict[str, str] = {}
    for where, fields in rows:
        query = _query(fields, where, complete)
        if query.id in seen:
            raise QueryError(f"{where}: two queries have one id: got {query.id!r}, also at {seen[query.id]}")
        seen[query.id] = where
        records.append(query)
    if not records:
        raise QueryError(f"{origin}: no query in it; give one JSON object a line with id, prompt and completion")
    return records


def _query(fields: dict[str, Any], where: str, complete: int | None) -> Query:
    for name in (name for name in fields if name not in FIELDS):
        near = get_close_matches(name, FIELDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"a query has {', '.join(FIELDS)}"
        raise QueryError(f"{where}: a query has no such field: got {name!r}; {hint}")
    name = checked_id(fields.get("id"), where)
    prompt, completion, contrast = (_text(fields.get(field), field, where) for field in FIELDS[1:])
    if not prompt and not completion:
        raise QueryError(f"{where}: query {name!r} has neither a prompt nor a completion; give at least a completion")
    if not completion and complete is None:
        raise QueryError(_no_completion(where, name))
    if contrast == "":
        raise QueryError(f"{where}: the contrast of query {name!r} is empty; give a second completion, or leave it out")
    return Query(name, prompt or "", completion or None, contrast, where)


def _no_completion(where: str, name: str) -> str:
    what = f"{where}: query {name!r} has no completion"
    return f"{what}; give one, or add --complete N to take the model's own answer of at most N tokens"


def checked_id(value: Any, where: str) -> str:
    """Return the id of a query as a text.

    Raises:
        QueryError: neither a text nor a whole number, or one that cannot name a column of the results.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise QueryError(f"{where}: a query needs an id: got {value!r}; give a text or a whole number")
    if str(value) in RESERVED:
        what = f"{where}: the id {value!r} is the name of a column of the results"
        raise QueryError(f"{what}; choose another than {', '.join(RESERVED)}")
    _text(str(value), "id", where)
    return str(value)


def _text(value: Any, field: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise QueryError(f"{where}: the field {field!r} is not a text: got {value!r}")
    if fault := half_pair(field, value or ""):
        raise QueryError(f"{where}: {fault}")
    return value
