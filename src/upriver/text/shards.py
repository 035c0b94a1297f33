"""Shards of tokens, as trainings read them: numbers one after the other, documents separated by the end token."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from upriver.errors import CorpusError

LONGEST = 1 << 20  # tokens of a document: a longer one, or what has no end token, is cut
LLM_C = {20240520: 2, 20240801: 4}  # how the shards of llm.c begin -> bytes of a token
LLM_C_HEADER = 1024  # bytes


class Shard(NamedTuple):
    """What a file of tokens does not say itself."""

    dtype: str  # of a .bin file: uint16 or uint32
    end: int | None  # the token that ends a document


UNTOLD = Shard("uint16", None)


def token_rows(source: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The documents of a ``.bin`` or ``.npy`` file, each with its end token, numbered from 1; one is in memory at a time.

    A matrix has a document in each row.

    Raises:
        CorpusError: it holds no tokens of that type.
    """
    number, path, shard = 0, source.path, source.shard
    try:
        with open(path, "rb") as file:
            dtype, start, width = _npy(path, file) if path.suffix.lower() == ".npy" else _bin(path, file, shard)
            file.seek(start)
            for document in _rows(file, dtype, width) if width else _documents(file, dtype, shard.end):
                if shard.end is None or bool((document != shard.end).any()):
                    number += 1
                    yield number, {"input_ids": document.astype(np.int64)}
                source.read_bytes = file.tell()
    except OSError as reason:
        raise CorpusError(f"{path}:{number + 1}: the file cannot be read: {reason.strerror}; make it again") from reason


def _npy(path: Path, file: Any) -> tuple[np.dtype, int, int]:
    """The type of the numbers, where they begin, and how long a row of a matrix is (0: they are one row)."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, transposed, dtype = read(file)
    except ValueError as reason:
        raise CorpusError(f"{path}: not a .npy file: {reason}; write it with numpy.save") from reason
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or (transposed and len(shape) == 2) or 0 in shape:
        raise CorpusError(
            f"{path}: not tokens: got {dtype} of the shape {shape}; give whole numbers in one row, or a row a document"
        )
    if os.fstat(file.fileno()).st_size - file.tell() != dtype.itemsize * int(np.prod(shape)):
        raise CorpusError(f"{path}: not as long as its header says; it is damaged or cut short, make it again")
    return dtype, file.tell(), shape[1] if len(shape) == 2 else 0


def _bin(path: Path, file: Any, shard: Shard) -> tuple[np.dtype, int, int]:
    dtype, size, start = np.dtype(shard.dtype).newbyteorder("<"), os.fstat(file.fileno()).st_size, 0
    head = np.frombuffer(file.read(1 << 16), np.uint8)
    if len(head) >= LLM_C_HEADER and (width := LLM_C.get(int(head[:4].view("<i4")[0]))):
        dtype, start = np.dtype(f"<u{width}"), LLM_C_HEADER
    if not size or (size - start) % dtype.itemsize:
        raise CorpusError(
            f"{path}: not tokens of {dtype.name}: got {size:,} bytes; say it with --token-dtype, or make the file again"
        )
    first = head[start : len(head) // 4 * 4].view("<u2")
    if dtype.itemsize == 2 and len(first) >= 16 and not first[1::2].any() and first.any():
        raise CorpusError(
            f"{path}: not tokens of uint16: got 0 in every second place; they look like --token-dtype uint32"
        )
    return dtype, start, 0


def _rows(file: Any, dtype: np.dtype, width: int) -> Iterator[np.ndarray]:
    while content := file.read(dtype.itemsize * width):
        yield np.frombuffer(content, dtype)


def _documents(file: Any, dtype: np.dtype, end: int | None) -> Iterator[np.ndarray]:
    """Cut behind each end token, and where none comes for long."""
    left = np.empty(0, dtype)
    while content := file.read(dtype.itemsize * LONGEST):
        left = np.concatenate([left, np.frombuffer(content, dtype)])
        ends = np.flatnonzero(left == end) + 1 if end is not None else np.empty(0, np.int64)
        start = 0
        for stop in ends.tolist():
            yield from _cut(left[start:stop])
            start = stop
        left = left[start:]
        while len(left) > LONGEST:
            yield left[:LONGEST]
            left = left[LONGEST:]
    if len(left):
        yield left


def _cut(document: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(document), LONGEST):
        yield document[start : start + LONGEST]
