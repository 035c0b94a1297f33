"""A corpus of text: sequences of tokens, each of which knows its document and its characters there.

Axes: N sequences.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import CorpusError
from upriver.runtime import heads
from upriver.runtime.artifact import Info, check, digest, read_head, unreadable
from upriver.text.batch import Batch, Sequences, pad
from upriver.text.build import TABLES, Progress, Stream, build, exclusive
from upriver.text.memory import source_of
from upriver.text.reading import TOKEN_DTYPES, Reading
from upriver.text.records import LISTED, BadRecords, Record, open_corpus, read_records
from upriver.text.shards import Shard
from upriver.text.sources import Source
from upriver.text.tokenise import Decoder, encode, largest_token, require_offsets, tokenizer_fingerprint

SCHEMA = 7  # raise it when the same files would give other sequences, or the artifact another layout

AGAIN = "delete that folder and give the same command again"  # what to do about a damaged one


class Corpus(Sequences):
    """Sequences of tokens, read from an artifact that is made once (`Corpus.read`).

    A document of at most ``seq_len`` tokens is one sequence; a longer one is cut into windows, and the windows partition
    its characters exactly.  Windows in which no token is predicted are left out (``info["windows_without_loss"]``).
    With ``pack`` documents follow each other, the end token between them: a sequence then belongs to the document that
    it starts in, ``span_N2`` ends with that document, and `text` goes on into the next ones.

    Attributes:
        lengths_N: int32, tokens of each sequence.
        document_of_N: int32, the document of each sequence; a part of one, or a turn of its conversation, where these are
            read on their own: documents of one id, one after the other.
        record_of_N: int32, the number of its record, in the order of `records`.
        span_N2: int64, its first character in the document, and the one after its last.
        keys_N: uint64, its counter key: a hash of its tokens and their loss, whatever its place.
        fingerprint: a hash of files, tokenizer and settings.
        reused: the artifact was there already.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, path: str | list[str] | None, reused: bool):
        stored = _stored(folder)
        self.tokenizer = tokenizer
        self.fingerprint = folder.name
        self.reused = reused
        self._given: list[Source] | None = None  # records in memory
        told = {name: x for name, x in stored.items() if name not in ("stage", "schema", "files")}
        self.info: dict[str, Any] = {"path": path, **told}
        self.pack = bool(stored["pack"])
        self.reading = Reading.of(stored)
        self.n_documents, self.n_tokens = int(stored["documents"]), int(stored["tokens"])
        self.max_token = int(stored["max_token"])
        try:
            self._tokens, self._loss, self._text, self._documents = (
                Stream(folder / f"{name}.bin", dtype)
                for name, dtype in (("tokens", stored["dtype"]), ("loss", bool), ("text", "u1"), ("documents", "u1"))
            )
            self._starts_D3 = np.load(folder / "starts.npy", mmap_mode="r")
            self._offset_N, self.lengths_N, self.document_of_N, self.record_of_N, self.span_N2, self.keys_N = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in TABLES
            )
        except (OSError, ValueError) as error:
            raise unreadable(folder, error, AGAIN) from error
        self._cached_text = lru_cache(16)(self._read_text)
        self._cached_cuts = lru_cache(16)(self._cut)
        self._decoder = Decoder(tokenizer)

    @classmethod
    def read(
        cls,
        path: str | Path | Iterable[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int = 512,
        pack: bool = False,
        on_bad_record: str = "error",
        cache: str | Path | None = None,
        progress: Progress | None = None,
        *,
        text_field: str | None = None,
        prompt_field: str | None = None,
        completion_field: str | None = None,
        split: str | None = None,
        token_dtype: str | None = None,
    ) -> "Corpus":
        """Read JSON, Parquet, CSV, text or tokens, a folder of these, or a `datasets` folder or name; or several of them.

        Records have ``text``, or ``prompt`` and ``completion``, or ``messages`` (loss on the answers only), or another of the
        shapes of ``docs/formats.md``, an optional ``id``, and further fields, kept as metadata; records of one ``id`` that
        follow each other are parts of one document.  The tokens are kept under ``cache`` (default: ``$UPRIVER_CACHE``, else
        ``~/.cache/upriver``) by content, and found there the next time.

        Args:
            on_bad_record: ``error``, or ``skip``: count and list them in ``info["skipped"]``.
            text_field, prompt_field, completion_field: what the records call these fields.
            split: of a data set that has several, such as ``train``.
            token_dtype: ``uint16`` or ``uint32``, of ``.bin`` files of tokens.
            progress: called with the bytes read so far and their total (rows, for `datasets` data).

        Raises:
            ConfigError: ``seq_len`` below 2, or other settings that make no sense.
            CorpusError: a file or record that cannot be used; the message names file and line.
            ModelError: the tokenizer does not tell character offsets.
            StorageError: the cache cannot be written.

        Example:
            >>> corpus = Corpus.read("corpus.jsonl", tokenizer, seq_len=512)
            >>> corpus.text(0)
        """
        fields = (text_field, prompt_field, completion_field)
        reading = Reading(seq_len, pack, on_bad_record, *fields, split, token_dtype).checked()
        paths = [path] if isinstance(path, str | Path) else list(path)
        names, left_out = [str(x) for x in paths], []
        told = names[0] if len(names) == 1 else names
        require_offsets(tokenizer)
        bad, shard = BadRecords(on_bad_record), shard_of(reading, tokenizer)
        sources = open_corpus([Path(x) for x in names], bad, reading, shard, left_out)
        return cls._made(sources, told, bad, tokenizer, reading, cache, progress, left_out)

    @classmethod
    def of(
        cls,
        records: Any,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int = 512,
        pack: bool = False,
        on_bad_record: str = "error",
        cache: str | Path | None = None,
        progress: Progress | None = None,
        *,
        text_field: str | None = None,
        prompt_field: str | None = None,
        completion_field: str | None = None,
        split: str | None = None,
    ) -> "Corpus":
        """Take records that are in memory, as `read` takes those of files: a list of dictionaries or texts, a pandas frame, or a
        ``datasets.Dataset``.

        Raises:
            ConfigError, CorpusError, ModelError, StorageError: as `read`.

        Example:
            >>> corpus = Corpus.of([{"prompt": "2 + 2 =", "completion": " 4"}, "a text"], tokenizer)
        """
        fields = (text_field, prompt_field, completion_field)
        reading = Reading(seq_len, pack, on_bad_record, *fields, split).checked()
        sources, bad = [source_of(records, split)], BadRecords(on_bad_record)
        made = cls._made(sources, None, bad, tokenizer, reading, cache, progress, [])
        made._given = sources
        return made

    @classmethod
    def _made(
        cls, sources: list[Source], told: Any, bad: BadRecords, tokenizer: PreTrainedTokenizerBase, reading: Reading,
        cache: str | Path | None, progress: Progress | None, left_out: list[str],
    ) -> "Corpus":  # fmt: skip
        written = [source.written for source in sources]
        hashed = [source.fingerprint for source in sources]
        found = corpus_digest(hashed, tokenizer_fingerprint(tokenizer), reading)
        folder = _cache_folder(cache) / "corpus" / found
        reused = os.path.exists(folder)  # false also where it cannot be known: building then says why
        if not reused:
            with exclusive(folder.with_name(f".{folder.name}.lock")):
                reused = folder.exists()
                if not reused:
                    build(folder, sources, bad, tokenizer, reading, list(zip(hashed, written, strict=True)), progress)
        corpus = cls(folder, tokenizer, told, reused)
        corpus.info["left_out"] = {"count": len(left_out), "first": left_out[:LISTED]}
        return corpus

    def sources(self) -> list[Source]:
        """The files that it was read from."""
        if self._given is not None:
            return self._given
        paths = self.info["path"] if isinstance(self.info["path"], list) else [self.info["path"]]
        shard = shard_of(self.reading, self.tokenizer)
        return open_corpus([Path(x) for x in paths], BadRecords(self.reading.on_bad_record), self.reading, shard)

    def records(self) -> Iterator[Record]:
        """The record of each document, read again from the files, in the order of the documents.

        Raises:
            CorpusError: they hold other documents by now.
        """
        document, last = 0, len(self._starts_D3) - 1
        for record in read_records(self.sources(), BadRecords(self.reading.on_bad_record), self.reading):
            first = document
            while document < last and self.named(document) == (record.id, record.part):
                document += 1  # as many as the texts of the record
            if document > first:
                yield record
        if document < last:
            raise CorpusError(
                f"the corpus changed since it was read: got {self.info['path']}, without the document "
                f"{self.document_id(document)!r}; give the same command again when nothing writes to it any more"
            )

    def batch(self, rows: np.ndarray) -> Batch:
        """The sequences ``rows`` as one right-padded batch."""
        rows = np.asarray(rows, np.int64)
        slices = [self._slice(row) for row in rows]
        return pad(rows, self.keys_N[rows], [self._tokens[s] for s in slices], [self._loss[s] for s in slices])

    def _slice(self, row: int) -> slice:
        start = int(self._offset_N[row])
        return slice(start, start + int(self.lengths_N[row]))

    def token_ids(self, row: int) -> np.ndarray:
        """The tokens of a sequence, int64."""
        return self._tokens[self._slice(row)].astype(np.int64)

    def text(self, row: int) -> str:
        """The characters of a sequence, exactly as they are in its document."""
        if self.pack:
            return "".join(self.pieces(row))
        start, end = self.span_N2[row]
        return self.document_text(int(self.document_of_N[row]))[start:end]

    def pieces(self, row: int) -> list[str]:
        """The text of each token of a sequence; joined they are `text`.

        A token that continues a character of several bytes, or that the tokenizer added, has none.
        """
        span, document = self._slice(row), int(self.document_of_N[row])
        pieces, start = [], span.start
        while start < span.stop:
            first, after = int(self._starts_D3[document, 0]), int(self._starts_D3[document + 1, 0])
            text, cuts_C = (
                self.document_text(document),
                self._cached_cuts(document)[start - first : span.stop - first + 1],
            )
            pieces += [text[a:b] for a, b in pairwise(cuts_C.tolist())]
            start, document = after, document + 1
        return pieces

    def _cut(self, document: int) -> np.ndarray:
        """Where each token of a document begins in its text."""
        line = self._line(document)
        first, after = self._starts_D3[document : document + 2, 0].tolist()
        if line["special"] is None:  # it came as tokens
            encoded = self._decoder.decoded(self._tokens[after - line["tokens"] : after].astype(np.int64))[1]
        else:
            encoded = encode(self.tokenizer, [self.document_text(document)], line["special"])[0]
        # a packed document begins with the end token of the one before
        added = after - first - len(encoded.tokens_T)
        return np.concatenate([np.zeros(added, encoded.cuts_C.dtype), encoded.cuts_C])

    def document_text(self, document: int) -> str:
        """A document as it was tokenised: prompt and completion joined, messages as the chat template renders them."""
        return self._cached_text(int(document))

    def _read_text(self, document: int) -> str:
        start, end = self._starts_D3[document : document + 2, 1]
        return self._text[start:end].tobytes().decode()

    def _line(self, document: int) -> dict[str, Any]:
        start, end = self._starts_D3[document : document + 2, 2]
        return json.loads(self._documents[start:end].tobytes())

    def document_id(self, document: int) -> str:
        return self._line(document)["id"]

    def named(self, document: int) -> tuple[str, int]:
        """Its id, and which of the records of that id it is, from 0."""
        line = self._line(document)
        return line["id"], line["part"]

    def metadata(self, document: int) -> dict[str, Any]:
        """The further fields of a document's record."""
        return self._line(document)["metadata"]


def corpus_digest(sources: list[list[str]], tokenizer: str, reading: Reading) -> str:
    """The fingerprint of a corpus: of its files, of the tokenizer, and of how it is read."""
    settings = {"schema": [SCHEMA, heads.SCHEMA], "settings": reading._asdict()}
    return digest(settings | {"sources": sources, "tokenizer": tokenizer})


def shard_of(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> Shard:
    """How a file of tokens is read: of the type that is named, or that the vocabulary needs."""
    suits = TOKEN_DTYPES[largest_token(tokenizer) >= 2**16]
    end = tokenizer.eos_token_id
    return Shard(reading.token_dtype or suits, end if isinstance(end, int) else None)


def _stored(folder: Path) -> dict[str, Any]:
    """What ``info.json`` tells, all files verified."""
    info = read_head(folder / "info.json", Info, f"not a corpus of this program: got {folder}; {AGAIN}", AGAIN)
    if info["fingerprint"] != folder.name:
        raise unreadable(folder, f"it holds another corpus, {info['fingerprint']}", AGAIN)
    for name in info["files"]:
        check(folder / name, AGAIN)
    return info


def _cache_folder(given: str | Path | None) -> Path:
    return Path(given or os.environ.get("UPRIVER_CACHE") or "~/.cache/upriver").expanduser()
