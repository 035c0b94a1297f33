"""Inputs and output gradients that several passes of a fit ask for: kept on the disk, where that is faster than the model.

    with Kept(folder, layers, {labels}) as kept:
        sweep(model, group, data, batches, consumer, labels, kept=kept)      # runs the model, and writes
        sweep(model, other, data, batches, consumer, labels, kept=kept)      # reads

A token of a layer takes ``O + I`` numbers, and ``2 O I`` multiplications to compute again, with all that lies between the layers.
What is read has the bits of what was written, so nothing depends on whether it was kept.  The file has no name: it is gone
with the process.  It goes past the page cache, where the system allows that, so it takes no memory but a few ``CHUNK``.
"""

import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.model.layers import Layer

CHUNK, BUFFERS = 4 << 20, 12  # bytes that are written at once; chunks on their way
BLOCK = 4096  # what direct reads and writes are aligned to
TRIAL = 4  # batches after which writing may be given up


class Piece(NamedTuple):
    """Where a tensor lies in the file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Record(NamedTuple):
    layer: Layer
    a: Piece
    g: Piece


class Kept:
    """What ``layers`` saw of each batch, in the order in which the backward pass went through them.

    Args:
        folder: on the disk that holds the file.
        again: the labels with which several passes go over the same batches; others are not kept.
    """

    def __init__(self, folder: Path, layers: list[Layer], again: Collection[Hashable]):
        self.layers, self._again = layers, again
        self._file = _direct(tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115 - closed in __exit__
        self._end, self._failed = 0, False
        self._records: dict[tuple[Hashable, bytes], list[Record]] = {}
        self._disk = ThreadPoolExecutor(1)
        self._last: Future | None = None  # what is written is so in order
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(mmap.mmap(-1, CHUNK))
        self._waited = self._ran = 0.0  # seconds, for the disk and otherwise

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.submit(self._file.close)  # a third of a second for 2 GB, which nobody has to wait for
        self._disk.shutdown(wait=False)

    def holds(self, labels: Hashable, rows: np.ndarray) -> bool:
        if (labels, rows.tobytes()) not in self._records:
            return False
        if self._last is not None:
            self._last.result()
        if self._failed:  # a full disk: the model does it all again
            self._records.clear()
        return not self._failed

    def recorder(self, labels: Hashable, wanted: list[Layer], consume: "Consume") -> "Recorder | None":
        """A consumer that writes besides; None where nothing is kept, or writing takes too long."""
        slow = len(self._records) >= TRIAL and self._waited > self._ran / 2  # reading takes about as long again
        if labels not in self._again or self._failed or slow:
            return None
        return Recorder(self, labels, {x.name for x in wanted}, consume)

    def keep(self, labels: Hashable, rows: np.ndarray, records: list[Record], seconds: float, waited: float) -> None:
        """A batch is written, of whose ``seconds`` some were ``waited`` for the disk."""
        self._records[labels, rows.tobytes()] = records
        self._ran, self._waited = self._ran + seconds - waited, self._waited + waited

    def read(self, labels: Hashable, rows: np.ndarray, wanted: list[Layer]) -> Iterator[tuple[Layer, Tensor, Tensor]]:
        """Layer, input and output gradient of each wanted layer, on the CPU; they hold until the next ones are asked for."""
        names, buffers = {x.name for x in wanted}, [_Pair(), _Pair()]
        records = [r for r in self._records[labels, rows.tobytes()] if r.layer.name in names]
        coming = [self._disk.submit(self._load, r, buffers[0]) for r in records[:1]]
        for i, record in enumerate(records):
            a_NTI, g_NTO = coming.pop().result()
            if i + 1 < len(records):
                coming.append(self._disk.submit(self._load, records[i + 1], buffers[(i + 1) % 2]))
            yield record.layer, a_NTI, g_NTO

    def write(self, x: Tensor) -> Piece:
        """Copy ``x`` and have it written; returns before it is."""
        piece = Piece(self._end, x.shape, x.dtype)
        bytes_P = x.contiguous().flatten().view(torch.uint8)
        for part_P in bytes_P.split(CHUNK):
            buffer, size = self._free.get(), _aligned(len(part_P))
            torch.frombuffer(buffer, dtype=torch.uint8)[: len(part_P)].copy_(part_P)
            self._last = self._disk.submit(self._put, buffer, size, self._end)
            self._end += size
        return piece

    def _put(self, buffer: mmap.mmap, size: int, start: int) -> None:
        try:
            if not self._failed:
                _whole(os.pwritev, self._file.fileno(), memoryview(buffer)[:size], start)
        except OSError:
            self._failed = True
            with suppress(OSError):  # what is left of the disk, or of a quota, is for the sums
                os.ftruncate(self._file.fileno(), 0)
        finally:
            self._free.put(buffer)

    def _load(self, record: Record, into: "_Pair") -> list[Tensor]:
        return [self._get(piece, into, i) for i, piece in enumerate((record.a, record.g))]

    def _get(self, piece: Piece, into: "_Pair", which: int) -> Tensor:
        buffer = into.of(which, _aligned(piece.size))
        _whole(os.preadv, self._file.fileno(), memoryview(buffer)[: _aligned(piece.size)], piece.start)
        return torch.frombuffer(buffer, dtype=piece.dtype, count=piece.shape.numel()).view(piece.shape)


Consume = Callable[[Layer, Tensor, Tensor], None]


class Recorder:
    """A consumer that writes what all layers of a batch see, and hands on what the wanted ones do."""

    def __init__(self, kept: Kept, labels: Hashable, wanted: set[str], consume: Consume):
        self._kept, self._labels, self._wanted, self._consume = kept, labels, wanted, consume
        self.begin()

    def begin(self) -> None:
        self._records: list[Record] = []
        self._shared: dict[str, Piece] = {}
        self._started, self._waited = time.perf_counter(), 0.0

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        if layer.name in self._wanted:
            self._consume(layer, a_NTI, g_NTO)
        started = time.perf_counter()
        if layer.A_of not in self._shared:
            self._shared[layer.A_of] = self._kept.write(a_NTI)
        self._records.append(Record(layer, self._shared[layer.A_of], self._kept.write(g_NTO)))
        self._waited += time.perf_counter() - started

    def end(self, rows: np.ndarray) -> None:
        self._kept.keep(self._labels, rows, self._records, time.perf_counter() - self._started, self._waited)


class _Pair:
    """Two buffers, for an input and a gradient, as long as the longest so far."""

    def __init__(self) -> None:
        self._buffers = [mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK)]

    def of(self, which: int, size: int) -> mmap.mmap:
        if len(self._buffers[which]) < size:
            self._buffers[which] = mmap.mmap(-1, size)
        return self._buffers[which]


def _aligned(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _whole(move: Callable[..., int], file: int, view: memoryview, start: int) -> None:
    """Read or write all of ``view``: a call may do less."""
    done = 0
    while done < len(view):
        moved = move(file, [view[done:]], start + done)
        if not moved:
            raise OSError("the file of kept activations is shorter than what was written to it")
        done += moved


def _direct(file: Any) -> Any:
    """The same file without the page cache, where its file system can do that."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwritev(file.fileno(), [mmap.mmap(-1, BLOCK)], 0)
    except (OSError, AttributeError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return file
