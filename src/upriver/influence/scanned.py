"""Raw scores of a scan, on the disk: filled unit by unit and read a few rows at a time, so memory does not grow with them.

Axes: N scanned sequences, Q queries, L layers, C rows of a chunk, G queries of one pass.  Files are read and written, not
mapped into memory: a mapped page that was touched counts as resident until the file is unmapped.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from upriver.errors import NumericalError, StorageError
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, atomic
from upriver.runtime.best import Best
from upriver.runtime.passes import SAMPLE

CHUNK_BYTES = 8 << 20  # of scores in memory at once
ITEM = 4  # bytes of a float32


class Table:
    """A float32 array in an ``.npy`` file of which ``table[3:9]`` and ``table[np.array([5, 2])]`` read rows into memory.

    Example:
        >>> Table(Path("scores.npy"))[np.array([5, 2])]
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, _ = np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()
        self.width = int(np.prod(self.shape[1:], dtype=np.int64))

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...]) -> "Table":
        """Make the file; what is not written later is zero."""
        with open(path, "wb") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + ITEM * int(np.prod(shape, dtype=np.int64)))
        return cls(path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        if isinstance(at, slice):
            first, stop, step = at.indices(len(self))
            assert step == 1
            return self._read([first], max(0, stop - first))
        return self._read(np.asarray(at), 1)

    def _read(self, firsts: list[int] | np.ndarray, count: int) -> np.ndarray:
        out = np.empty((len(firsts), count * self.width), np.float32)
        with open(self.path, "rb", buffering=0) as file:
            for row, first in zip(out, firsts, strict=True):
                file.seek(self.start + ITEM * self.width * int(first))
                if file.readinto(row.data) != row.nbytes:
                    raise StorageError(f"{self.path} is cut short; delete it and give the same command again")
        return out.reshape(-1, *self.shape[1:])

    def write(self, at: np.ndarray, columns: slice, values: np.ndarray) -> None:
        """``table[at, columns] = values``; neighbouring rows are written together where they are written whole."""
        inner = self.width // max(1, self.shape[1])
        whole = columns == slice(0, self.shape[1])
        cuts = np.flatnonzero(np.diff(at) != 1) + 1 if whole else np.arange(1, len(at))
        values = np.ascontiguousarray(values, np.float32)
        with open(self.path, "r+b") as file:
            for first, stop in zip([0, *cuts], [*cuts, len(at)], strict=True):
                file.seek(self.start + ITEM * (self.width * int(at[first]) + inner * columns.start))
                file.write(values[first:stop].data)


class Scanned(NamedTuple):
    """Raw scores of the scanned sequences: ``rows_N`` ascending, ``scores_NQ``, and ``layers_NQL`` when they were asked for.

    The two tables are on the disk: index them with a slice or an array of places for the rows that are needed.
    """

    rows_N: np.ndarray
    scores_NQ: Table
    layers_NQL: Table | None


def chunk_rows(scanned: Scanned, most: int) -> int:
    """How many rows of scores are in memory at once: at most ``most``, and as many as fit in `CHUNK_BYTES`."""
    return max(1, min(most, CHUNK_BYTES // (ITEM * scanned.scores_NQ.shape[1])))


def chunks(scanned: Scanned, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """``size`` consecutive places at a time, and their scores ``[C, Q]``."""
    for start in range(0, len(scanned.rows_N), size):
        at = slice(start, min(start + size, len(scanned.rows_N)))
        yield at, scanned.scores_NQ[at]


def scores_of(scanned: Scanned, rows: np.ndarray) -> np.ndarray:
    """The scores ``[R, Q]`` of some of the scanned sequences, given by their rows in the corpus."""
    return scanned.scores_NQ[np.searchsorted(scanned.rows_N, rows)]


class Scan(NamedTuple):
    """One pass over the corpus: the stage that holds its units, their number, and the queries that it scored."""

    stage: Artifact
    n_units: int
    queries: slice


def gather(passes: list[Scan], rows_N: np.ndarray, n_layers: int | None = None) -> Scanned:
    """Put the units of all passes in the order of ``rows_N`` (ascending), in two files in the first pass's folder.

    Units hold ``rows [n]``, ``scores [n, G]`` and, when there are ``n_layers``, ``layers [n, G, L]``.  The first process
    writes while the others wait.

    Raises:
        NumericalError: a score is NaN or infinite.
    """
    folder, Q = passes[0].stage.path, max(p.queries.stop for p in passes)
    shapes = {"scores": (len(rows_N), Q)} | ({"layers": (len(rows_N), Q, n_layers)} if n_layers else {})
    paths = {name: folder / f"{name}.npy" for name in shapes}
    dist.on_first(lambda: _fill(passes, rows_N, paths, shapes))
    return Scanned(rows_N, Table(paths["scores"]), Table(paths["layers"]) if n_layers else None)


def _fill(passes: list[Scan], rows_N: np.ndarray, paths: dict[str, Path], shapes: dict[str, tuple[int, ...]]) -> None:
    finite_N = np.ones(len(rows_N), bool)
    with ExitStack() as files:
        tables = {name: Table.create(files.enter_context(atomic(path)), shapes[name]) for name, path in paths.items()}
        for stage, n_units, queries in passes:
            for unit in range(n_units):
                part = stage.read(unit)
                at = np.searchsorted(rows_N, part["rows"].numpy())
                order = np.argsort(at)
                for name, table in tables.items():
                    table.write(at[order], queries, part[name].numpy()[order])
                finite_N[at] &= part["scores"].isfinite().all(1).numpy()
        if not finite_N.all():
            raise NumericalError(
                f"{(~finite_N).sum()} of {len(rows_N)} sequences got a score that is NaN or infinite; use --dtype float32"
            )


def extremes(scanned: Scanned, top: int) -> list[np.ndarray]:
    """For each query the ``top`` most positive and the ``top`` most negative sequences of the scan; ties by sequence."""
    N, Q = scanned.scores_NQ.shape
    ends = [(Best(min(top, N)), Best(min(top, N))) for _ in range(Q)]
    for at, scores_CQ in chunks(scanned, chunk_rows(scanned, N)):
        places_C = np.arange(at.start, at.stop)
        before_C = (N - places_C).astype(np.uint64)  # of equal lowest scores the later ones are kept
        for (high, low), score_C in zip(ends, np.ascontiguousarray(scores_CQ.T), strict=True):
            high.add(score_C, places_C)
            low.add(-score_C, places_C, before_C)
    return [scanned.rows_N[np.union1d(high.places, low.places)] for high, low in ends]


def random_rows(scanned: Scanned, seed: int) -> np.ndarray:
    """A random few of the scanned sequences, on which the error of the low rank is measured."""
    N = len(scanned.rows_N)
    return scanned.rows_N[np.random.default_rng(seed).choice(N, min(SAMPLE, N), replace=False)]


def publish(table: Table, path: Path) -> None:
    """Give a finished table a second name; where the disk has no links, copy it."""
    with atomic(path) as temporary:
        try:
            os.link(table.path, temporary)
        except OSError:
            shutil.copyfile(table.path, temporary)
