"""A query is an answer whose origin is asked for, or a set of such answers that is asked about as one.

It has a prompt and a completion, and optionally contrasts: further completions of which the mean log-probability is subtracted.
Prompt and completion are tokenised as one text; a token belongs to the completion when it ends beyond the last character
of the prompt.  What is measured of a set is the mean over its members: it is one question, one column, one gradient.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from upriver.errors import CorpusError, QueryError
from upriver.runtime.artifact import digest
from upriver.text.asked import Query, checked_query, no_completion, rendered
from upriver.text.batch import Batch, pad, sequence_hash, sequence_keys
from upriver.text.evaluations import Asking, questions
from upriver.text.sources import find_sources, rows
from upriver.text.tokenise import Encoded, encode, tokenizer_fingerprint


class Row(NamedTuple):
    """A row is one prompt with one completion, or the text that a direction is measured on, tokenised."""

    text: str
    encoded: Encoded
    loss_T: np.ndarray  # bool: completion tokens that have a context; of a direction the tokens of the text
    query: int  # the column
    record: int
    weight: float  # of n members 1/n for a completion, and -1/n over all its contrasts


class Part(NamedTuple):
    """Rows of queries that can go through the model in the same batches, which hold any of their ``lengths``."""

    lengths: np.ndarray  # tokens of every row there is
    batch: Callable[[np.ndarray], Batch]
    rows: np.ndarray


class Queries:
    """Queries are checked when they are read, and tokenised as soon as a tokenizer is known.

    Example:
        >>> queries = Queries.read("queries.jsonl", tokenizer, seq_len=512)
        >>> batch = queries.batch(np.array([0, 1]))

    Raises:
        QueryError: a query that cannot be used; the message names its file and line.
    """

    def __init__(
        self,
        records: Sequence[Query],
        tokenizer: PreTrainedTokenizerBase | None,
        seq_len: int | None = None,
        notes: Sequence[str] = (),
    ):
        self.records = list(records)
        self._tokenizer = tokenizer
        self.seq_len = seq_len
        self.notes = list(notes)  # what was left out where they were read
        self.members: dict[str, list[int]] = {}  # of each column the indices of its records
        for i, query in enumerate(self.records):
            self.members.setdefault(query.column, []).append(i)

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seq_len: int | None = None,
        complete: int | None = None,
        *,
        samples: str | None = None,
        as_set: str | None = None,
        right: bool = False,
    ) -> "Queries":
        """Read JSON lines, a JSON array, CSV or Parquet with the fields of ``docs/formats.md``, or the log of an evaluation.

        ``seq_len`` is the largest number of tokens a query may have.  With ``complete`` a query may lack its
        completion: it is then listed by ``needs_completion``, to be supplied by `completed`.  Without a tokenizer the
        queries are checked but not tokenised; `bound` does that later.

        Args:
            samples: of a log ``failed`` (None: these), ``passed`` or ``all``; ``failed:acc_norm`` goes by another score than the
                first.
            as_set: the name of one question that all of them are members of.
            right: of a log ask for the right answer against the one that the model gave, instead of the other way round.
        """
        asking = Asking(samples, right)
        found = list(_rows(Path(path), asking))
        records = _checked(found, str(path), complete, Path(path).parent, as_set)
        unbound = cls(records, None, seq_len, asking.notes)
        return unbound if tokenizer is None else unbound.bound(tokenizer)

    @classmethod
    def of(
        cls,
        queries: Iterable[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        seq_len: int | None = None,
        complete: int | None = None,
        *,
        as_set: str | None = None,
    ) -> "Queries":
        """Do the same with dictionaries; those without an ``id`` are named ``q1``, ``q2``, ..."""
        rows = ((f"query {n}", {"id": f"q{n}", **query}) for n, query in enumerate(queries, 1))
        unbound = cls(_checked(rows, "the list of queries", complete, None, as_set), None, seq_len)
        return unbound if tokenizer is None else unbound.bound(tokenizer)

    def bound(self, tokenizer: PreTrainedTokenizerBase, seq_len: int | None = None) -> "Queries":
        """Give the queries a tokenizer; they are tokenised at once, so that one that cannot be used is named early."""
        records = [rendered(query, tokenizer) for query in self.records]
        queries = Queries(records, tokenizer, seq_len if seq_len is not None else self.seq_len, self.notes)
        if not queries.needs_completion:
            queries.rows  # noqa: B018 - computed here for its errors
        return queries

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise QueryError("these queries have no tokenizer yet; give one to Queries.read, or call bound(tokenizer)")
        return self._tokenizer

    def __len__(self) -> int:
        return len(self.members)

    @property
    def ids(self) -> list[str]:
        return list(self.members)

    @property
    def needs_completion(self) -> list[int]:
        """Return the indices of the records whose completion is still to be generated."""
        return [i for i, query in enumerate(self.records) if query.unanswered]

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
        return Queries(records, None, notes=self.notes).bound(self.tokenizer, self.seq_len)

    def prompt_tokens(self, i: int) -> np.ndarray:
        """Return the tokens of a record's prompt, for the model to continue; a closing special token is left out."""
        encoded = encode(self.tokenizer, [self.records[i].prompt], self._special(i))[0]
        trailing = int(np.argmin(encoded.special_T[::-1])) if not encoded.is_empty else 0
        return encoded.tokens_T[: len(encoded.tokens_T) - trailing]

    def _special(self, i: int) -> bool:
        """Whether special tokens are added: a chat template brings its own, and so does a prompt that begins with one."""
        query, first = self.records[i], self.tokenizer.bos_token
        return query.chat is None and not (first and query.prompt.startswith(str(first)))

    @property
    def fingerprint(self) -> str:
        """Hash the queries, with their labels and directions, and the tokenizer."""
        vectors = [q.direction and q.direction.vector_H.tolist() for q in self.records]
        fields = [[q.again(), vector] for q, vector in zip(self.records, vectors, strict=True)]
        return digest([fields, tokenizer_fingerprint(self.tokenizer)])

    @cached_property
    def rows(self) -> list[Row]:
        """Return the rows that go through the model, in the order of the queries: one per completion, one more per contrast."""
        if self.needs_completion:
            query = self.records[self.needs_completion[0]]
            raise QueryError(no_completion(query.where, query.id))
        parts = [
            (column, i, answer, weight / len(members))
            for column, members in enumerate(self.members.values())
            for i in members
            for answer, weight in _answers(self.records[i])
        ]
        texts = [self.records[i].prompt + answer for _, i, answer, _ in parts]
        special = [self._special(i) for _, i, *_ in parts]
        encoded = {added: iter(encode(self.tokenizer, [t for t, s in zip(texts, special, strict=True) if s == added], added))
                   for added in set(special)}  # fmt: skip
        made = zip(parts, texts, special, strict=True)
        return [self._row(*part, text, next(encoded[added])) for part, text, added in made]

    def _row(self, column: int, i: int, answer: str, weight: float, text: str, encoded: Encoded) -> Row:
        query = self.records[i]
        what = f"{query.where}: the {'completion' if weight > 0 else 'contrast'} of query {query.id!r}"
        loss_T = encoded.ends_T > len(query.prompt)
        if query.direction:
            what, loss_T = f"{query.where}: the prompt of query {query.id!r}", ~encoded.special_T
        if not loss_T.any():
            given = answer or query.prompt
            raise QueryError(f"{what} has no token of its own: got {given!r}; give it at least one more word")
        if not query.direction:
            loss_T[0] = False
        if not loss_T.any():
            what += f" cannot be scored: its only token {answer!r} is the first of the text and has no context"
            raise QueryError(f"{what}; give a prompt, or a longer completion")
        if self.seq_len is not None and len(loss_T) > self.seq_len:
            what += f" is too long: got {len(loss_T)} tokens with its prompt, at most {self.seq_len} fit"
            raise QueryError(f"{what}; shorten the prompt")
        return Row(text, encoded, loss_T, column, i, weight)

    @cached_property
    def rows_of_query(self) -> list[list[int]]:
        """Return the indices of the rows of each query."""
        found: list[list[int]] = [[] for _ in self.members]
        for r, row in enumerate(self.rows):
            found[row.query].append(r)
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Return how many tokens each query counts for, int32 ``[Q]``: its longest row, times the rows that it has."""
        return np.array([self._lengths_R[r].max() * len(r) for r in self.rows_of_query], np.int32)

    @cached_property
    def _lengths_R(self) -> np.ndarray:
        return np.array([len(row.loss_T) for row in self.rows], np.int32)

    @cached_property
    def _keys(self) -> np.ndarray:
        hashes = [sequence_hash(row.encoded.tokens_T, row.loss_T) for row in self.rows]
        return sequence_keys(np.array(hashes, np.uint64))

    def parts(self, query_indices: Sequence[int] | np.ndarray) -> list[Part]:
        """Return all rows of the queries, for passes of any number of them at once: texts, and directions by layer."""
        kinds: dict[int, list[int]] = {}
        for r in (r for q in query_indices for r in self.rows_of_query[int(q)]):
            direction = self.records[self.rows[r].record].direction
            kinds.setdefault(direction.layer if direction else 0, []).append(r)
        return [Part(self._lengths_R, self.batch_of_rows, np.array(some)) for some in kinds.values()]

    def batch(self, query_indices: Sequence[int] | np.ndarray) -> Batch:
        """Return all rows of the queries, in the order given: of each member a completion, then its contrasts."""
        return self.batch_of_rows(np.array([r for q in query_indices for r in self.rows_of_query[int(q)]]))

    def batch_of_rows(self, rows: np.ndarray) -> Batch:
        """Return rows as one batch: texts, or directions in one layer."""
        picked = [self.rows[r] for r in rows]
        tokens, loss = [row.encoded.tokens_T for row in picked], [row.loss_T for row in picked]
        weight_N = torch.tensor([row.weight for row in picked])
        query_N = np.array([row.query for row in picked], np.int64)
        batch = pad(rows, self._keys[rows], tokens, loss)
        asked = [self.records[row.record].direction for row in picked]
        directions = [x for x in asked if x is not None]
        if directions:
            assert len(directions) == len(asked)
            assert len({x.layer for x in directions}) == 1
            own = {"layer": torch.tensor([x.layer for x in directions])}
            own |= {"direction": torch.from_numpy(np.stack([x.vector_H for x in directions]))}
            own |= {"first": torch.tensor([bool(row.loss_T[0]) for row in picked])}
            batch = dataclasses.replace(batch, inputs=batch.inputs | own)
        return dataclasses.replace(batch, weight_N=weight_N, query_N=query_N)

    def token_ids(self, i: int) -> np.ndarray:
        """Return the tokens of prompts, completions and contrasts, as often as they occur, without added special tokens."""
        parts, seen = [], set()
        for row in (self.rows[r] for r in self.rows_of_query[i]):
            parts.append(row.encoded.tokens_T[row.loss_T if row.record in seen else ~row.encoded.special_T])
            seen.add(row.record)
        return np.concatenate(parts)

    def pieces(self, r: int) -> list[str]:
        """Return the text of each scored token of a row."""
        pieces = self.rows[r].encoded.pieces(self.rows[r].text)
        return [pieces[t] for t in np.flatnonzero(self.rows[r].loss_T)]


def _answers(query: Query) -> list[tuple[str, float]]:
    """What stands behind the prompt, with its share of the measurement."""
    if query.direction:
        return [("", 1.0)]
    assert query.completion is not None
    return [(query.completion, 1.0), *((x, -1.0 / len(query.contrasts)) for x in query.contrasts)]


def _rows(path: Path, asking: Asking) -> Iterable[tuple[str, dict[str, Any]]]:
    """The fields of each query, and where they stand."""
    logged = questions(path, asking)
    if logged is not None:
        yield from logged
        return
    for source in find_sources(path, QueryError):
        if source.kind in ("text", "tokens"):
            what = f"queries are no plain text or tokens: got {source.path}"
            raise QueryError(f"{what}; give a .jsonl, .json, .csv or .parquet file")
        try:
            for line, row in rows(source):
                if isinstance(row, str):
                    raise QueryError(f"{source.path}:{line}: {row}")
                if source.kind == "csv":  # which has a cell for every field of every row
                    row = {
                        key: value for key, value in row.items() if value != "" or key in ("id", "prompt", "completion")
                    }
                yield f"{source.path}:{line}", row
        except CorpusError as error:
            raise QueryError(str(error)) from error


def _checked(
    rows: Iterable[tuple[str, dict[str, Any]]], origin: str, complete: int | None, beside: Path | None, as_set: str | None
) -> list[Query]:  # fmt: skip
    records: list[Query] = []
    seen: dict[str, Query] = {}
    columns: dict[str, Query] = {}
    for where, fields in rows:
        if as_set is not None:
            fields = fields | {"group": as_set}
        if fields.get("group") not in (None, "") and fields.get("id") in (None, ""):
            fields = fields | {"id": f"{fields['group']}/{len(records) + 1}"}
        query = checked_query(fields, where, complete is not None, beside)
        if query.id in seen:
            raise QueryError(f"{where}: two queries have one id: got {query.id!r}, also at {seen[query.id].where}")
        first = columns.setdefault(query.column, query)
        if (first.group is None) != (query.group is None):
            what = f"{where}: a query and a group have one name: got {query.column!r}, also at {first.where}"
            raise QueryError(f"{what}; each is a column of the results, give them different names")
        if (first.direction and first.direction.layer) != (query.direction and query.direction.layer):
            what = (
                f"{where}: the members of a group measure different things: got {query.column!r}, also at {first.where}"
            )
            raise QueryError(f"{what}; give answers and directions, and each layer, a group of their own")
        seen[query.id] = query
        records.append(query)
    if not records:
        raise QueryError(f"{origin}: no query in it; give one JSON object a line with id, prompt and completion")
    return records
