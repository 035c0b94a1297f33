"""The artifact of a corpus: tokenised once, then only mapped into memory.

    tokens.bin      all tokens, document after document          loss.bin        a byte each: carries loss
    text.bin        all text as UTF-8                            documents.bin   a line of JSON per document
    starts.npy      [D + 1, 3] where each document begins in tokens.bin, text.bin and documents.bin
    offset.npy, length.npy, document.npy, record.npy, span.npy, key.npy      a row per sequence: where it begins in tokens.bin,
                    its tokens, its document, the number of its record, its characters in the document, its counter key
    info.json       what was counted, and the checksum of every file; written last

What is a document here is one text: a record of several parts, or a conversation of which earlier turns are read on their
own, has several, one after the other, of one id.  Axes: D of these, N sequences, T tokens of a document, W windows.

It is built in a temporary folder and renamed, so a kill leaves nothing half-made.  Only the tables of numbers are held in
memory, never the text or the tokens; these are read, not mapped, because mapped pages that were touched count as resident.
"""

import errno
import fcntl
import os
import shutil
import warnings
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import ConfigError, CorpusError, ModelError, StorageError
from upriver.runtime.artifact import SCHEMA, abandoned, checksum, plain, write_array, write_json
from upriver.text.batch import sequence_hash, sequence_keys
from upriver.text.reading import Reading
from upriver.text.records import LISTED, BadRecords, Record, dump, read_records
from upriver.text.sources import Source
from upriver.text.tokenise import Document, documents, largest_token

STREAMS = ("tokens", "loss", "text", "documents")
TABLES = ("offset", "length", "document", "record", "span", "key")
Progress = Callable[[int, int], None]  # done, total


class Stream:
    """A file of numbers of one dtype; ``stream[start:stop]`` reads them.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """

    def __init__(self, path: Path, dtype: Any):
        self.dtype, self._file = np.dtype(dtype), os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._len = os.fstat(self._file).st_size // self.dtype.itemsize
        if not self._len:
            raise ValueError(f"{path.name} is empty")

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(len(self))
        assert step == 1
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._file, size * max(0, stop - start), size * start), self.dtype)


def _int64() -> "array[int]":
    return array("q")


@dataclass
class _Windows:
    """The sequences so far, as compact as a table: a document of many small arrays would take ten times its numbers."""

    offset: "array[int]" = field(default_factory=_int64)
    document: "array[int]" = field(default_factory=_int64)
    record: "array[int]" = field(default_factory=_int64)
    span: "array[int]" = field(default_factory=_int64)  # two a window

    def add(self, document: int, record: int, offset_W: np.ndarray, span_W2: np.ndarray) -> None:
        numbers = (np.full(len(offset_W), x) for x in (document, record))
        for table, new in zip(
            (self.offset, self.document, self.record, self.span), (offset_W, *numbers, span_W2), strict=True
        ):
            table.frombytes(np.ascontiguousarray(new, np.int64).tobytes())


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process builds here, so that each corpus is tokenised by one of them.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(plain(path), "w")  # noqa: SIM115 - held until the end of the block
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            warnings.warn(
                f"{path} cannot be locked ({error}): read this corpus in no other process meanwhile", stacklevel=3
            )
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full: {path} could not be written; free some space and try again"
            ) from error
        raise ConfigError(
            f"the cache cannot be written: got {path} ({error}); set UPRIVER_CACHE to a folder that you may write to"
        ) from error


def build(
    folder: Path,
    sources: list[Source],
    bad: BadRecords,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    hashed: list[tuple[Any, Any]],
    progress: Progress | None = None,
) -> None:
    """Tokenise ``sources`` into ``folder``, which appears when it is complete, and is named by what was read.

    Args:
        hashed: the fingerprint of each source when ``folder`` was named, and when its files had been written to before that.

    Raises:
        CorpusError: a record that cannot be used, no sequence at all, or a file that has changed since it was hashed.
        ConfigError, StorageError: the folder cannot be written.
    """
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        if abandoned(left.name):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with _writing(folder):
            partial.mkdir(parents=True)
            info = _fill(partial, sources, bad, tokenizer, reading, progress or (lambda done, total: None))
            for source, told in zip(sources, hashed, strict=True):
                source.check_read(*told)
            files = {p.name: checksum(p) for p in sorted(partial.iterdir())}
            head = {"stage": "corpus", "schema": SCHEMA, "fingerprint": folder.name}
            write_json(partial / "info.json", head | info | {"files": files})
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(
    folder: Path,
    sources: list[Source],
    bad: BadRecords,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    progress: Progress,
) -> dict[str, Any]:
    end = _end_token(tokenizer) if reading.pack else None
    dtype = "<u2" if largest_token(tokenizer) < 2**16 else "<u4"
    total = sum(source.size for source in sources)
    windows, counted = _Windows(), _Counted()
    with _Streams(folder, dtype) as streams:
        for chunk in documents(read_records(sources, bad, reading), tokenizer, bad):
            for document in chunk:
                _append(document, streams, windows, counted, reading, end)
            progress(sum(source.read_bytes for source in sources), total)
    starts = np.frombuffer(streams.starts, np.int64).reshape(-1, 3)
    if len(starts) == 1:
        raise CorpusError(f"the corpus is empty: got {_names(sources)} with {bad.count} bad records and no good one")
    write_array(folder / "starts.npy", starts)
    return {
        **counted.told(sources),
        **_finish(folder, windows, reading, dtype),
        **reading._asdict(),
        "separators": {source.name: source.separator for source in sources if source.separator not in ("", ",")},
        "skipped": {"count": bad.count, "first": bad.listed},
        "dtype": dtype,
    }


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count:,} records"


def _names(sources: list[Source]) -> str:
    return str(sources[0].path) if len(sources) == 1 else f"{len(sources)} files"


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError(
            "packing puts the end token between documents, and the tokenizer has none: got eos_token=None; "
            "set its eos_token, or do without --pack"
        )
    return tokenizer.eos_token_id


class _Counted:
    """What was read, counted as it goes by."""

    def __init__(self) -> None:
        self.last: Record | None = None
        self.records = self.documents = self.doubled = 0
        self.notes: Counter[str] = Counter()
        self.of_source: Counter[int] = Counter()

    def add(self, document: Document) -> None:
        record = document.record
        if record is self.last:  # another turn of its conversation
            return
        first = self.last is None or record.id != self.last.id
        self.last, self.records, self.documents = record, self.records + 1, self.documents + first
        self.of_source[record.source] += first
        self.doubled += document.doubled
        if document.note:
            self.notes[document.note] += 1

    def told(self, sources: list[Source]) -> dict[str, Any]:
        notes = [f"{_records(count)}: {note}" for note, count in self.notes.most_common()]
        if self.records > self.documents:
            notes.append(
                f"{_records(self.records)} make {self.documents:,} documents: parts of one have one id and follow each other"
            )
        if self.doubled:
            notes.append(
                f"{_records(self.doubled)} with two start tokens: their text has one, and the tokenizer adds its own; "
                "take it out of the records, or switch add_bos_token off in the tokenizer, as the model was trained"
            )
        listed = {sources[n].name: self.of_source[n] for n in range(min(len(sources), LISTED))}
        read = {"count": len(sources), "documents": listed}
        shard = next((source.shard for source in sources if source.kind == "tokens"), None)
        if shard:
            end = "no end token" if shard.end is None else f"the end token {shard.end}"
            binary = any(source.path.suffix.lower() == ".bin" for source in sources)
            what = f"tokens are read as {shard.dtype} (--token-dtype)" if binary else "tokens are read"
            notes.append(f"{what}, documents end with {end}")
        return {"shard": shard, "documents": self.documents, "records": self.records, "sources": read, "notes": notes}


class _Streams:
    """The files that grow with every document, and where each document begins in them."""

    def __init__(self, folder: Path, dtype: str):
        self.folder = folder
        self.dtype = dtype
        self.starts = array("q", (0, 0, 0))  # three a document
        self.last_token = -1
        self._open = ExitStack()

    def __enter__(self) -> "_Streams":
        self._files = [self._open.enter_context((self.folder / f"{name}.bin").open("wb")) for name in STREAMS]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._open:
            for file in self._files if kind is None else ():
                file.flush()
                os.fsync(file.fileno())

    @property
    def n_tokens(self) -> int:
        return self.starts[-3]

    @property
    def n_documents(self) -> int:
        return len(self.starts) // 3 - 1

    def write(self, tokens_T: np.ndarray, loss_T: np.ndarray, text: bytes, line: bytes) -> None:
        contents = tokens_T.astype(self.dtype).tobytes(), loss_T.astype(np.uint8).tobytes(), text, line
        for file, content in zip(self._files, contents, strict=True):
            file.write(content)
        n_tokens, n_text, n_lines = self.starts[-3:]
        self.starts.extend((n_tokens + len(tokens_T), n_text + len(text), n_lines + len(line)))
        self.last_token = int(tokens_T[-1])


def _append(
    document: Document, streams: _Streams, windows: _Windows, counted: _Counted, reading: Reading, end: int | None
) -> None:
    """Write one document and cut it into windows; a packed one begins with the end token of the document before it."""
    record, encoded = document.record, document.encoded
    counted.add(document)
    tokens_T, cuts_C, loss_T = encoded.tokens_T, encoded.cuts_C, document.loss_T
    first = streams.n_tokens
    if end is not None and first and streams.last_token != end:
        tokens_T, cuts_C = np.insert(tokens_T, 0, end), np.insert(cuts_C, 0, 0)
        loss_T = np.insert(loss_T, 0, loss_T.all())
    last = first + len(tokens_T)
    begin = -(-first // reading.seq_len) * reading.seq_len if reading.pack else first
    offset_W = np.arange(begin, last, reading.seq_len)
    ends_W = np.minimum(offset_W + reading.seq_len, last)
    span_W2 = np.stack([cuts_C[offset_W - first], cuts_C[ends_W - first]], axis=1)
    windows.add(streams.n_documents, counted.records - 1, offset_W, span_W2)
    line = {"id": record.id, "part": record.part, "metadata": record.metadata}
    line |= {"special": document.special, "tokens": len(encoded.tokens_T)}
    streams.write(tokens_T, loss_T, document.text.encode(), dump(line))


def _finish(folder: Path, windows: _Windows, reading: Reading, dtype: str) -> dict[str, Any]:
    """Drop the windows in which nothing is predicted, and write the table of the others."""
    tokens, loss = Stream(folder / "tokens.bin", dtype), Stream(folder / "loss.bin", bool)
    offset_N, document_N, record_N, span_N2 = (
        np.frombuffer(x, np.int64) for x in (windows.offset, windows.document, windows.record, windows.span)
    )
    ends_N = len(tokens) if reading.pack else np.load(folder / "starts.npy", mmap_mode="r")[:, 0][document_N + 1]
    length_N = np.minimum(reading.seq_len, ends_N - offset_N)
    hash_N, kept_N = np.zeros(len(offset_N), np.uint64), np.zeros(len(offset_N), bool)
    for n in range(len(offset_N)):
        at = slice(int(offset_N[n]), int(offset_N[n] + length_N[n]))
        loss_T = loss[at]
        kept_N[n] = loss_T[1:].any()
        hash_N[n] = sequence_hash(tokens[at], loss_T)
    if not kept_N.any():
        raise CorpusError(
            f"no sequence has a token to predict: got {len(kept_N)} of one token, or without an answer in them; "
            "give longer texts or a larger sequence length"
        )
    write_array(folder / "offset.npy", offset_N[kept_N])
    write_array(folder / "length.npy", length_N[kept_N].astype(np.int32))
    write_array(folder / "document.npy", document_N[kept_N].astype(np.int32))
    write_array(folder / "record.npy", record_N[kept_N].astype(np.int32))
    write_array(folder / "span.npy", span_N2.reshape(-1, 2)[kept_N])
    write_array(folder / "key.npy", sequence_keys(hash_N[kept_N]))
    return {
        "sequences": int(kept_N.sum()),
        "tokens": int(length_N[kept_N].sum()),
        "windows_without_loss": int((~kept_N).sum()),
        "max_token": int(max(int(tokens[i : i + 2**20].max()) for i in range(0, len(tokens), 2**20))),
    }
