"""The linear datamodelling score: how well sums of scores over subsets rank what models trained on these subsets do.

Axes: M trained models, S different subsets, N sequences, Q queries.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import rankdata

from upriver.errors import ConfigError, MismatchError, NumericalError, StorageError
from upriver.runtime.artifact import check

LAYOUT = (
    "'masks' [models, sequences] and 'values' [models, queries], as lists in a Parquet file or as arrays in an npz file"
)


@dataclass(frozen=True)
class Bank:
    """What was measured on models that were trained on subsets of a corpus.

    Attributes:
        masks_MN: bool, the sequences that each model was trained on.
        values_MQ: float64, ``f`` of every query.
        seed_M: of each training.
        queries: names of the queries.
    """

    masks_MN: np.ndarray
    values_MQ: np.ndarray
    seed_M: np.ndarray
    queries: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, masks: Any, values: Any, seeds: Any = None, queries: list[str] | None = None) -> "Bank":
        """A bank of the arrays ``masks`` ``[M, N]`` (true or 1: trained on) and ``values`` ``[M, Q]``.

        Raises:
            MismatchError: they do not belong together.
            NumericalError: a value that is no number.
        """
        masks_MN, values_MQ = np.asarray(masks), np.asarray(values, np.float64)
        if masks_MN.ndim != 2 or values_MQ.ndim != 2 or len(masks_MN) != len(values_MQ) or not masks_MN.size:
            raise MismatchError(
                f"masks and values do not belong together: got the shapes {masks_MN.shape} and {values_MQ.shape}; give {LAYOUT}"
            )
        if not np.isin(masks_MN, (0, 1)).all():
            raise MismatchError(
                f"a mask says of each sequence whether it was trained on: got other values than 0 and 1; give {LAYOUT}"
            )
        bad = np.flatnonzero(~np.isfinite(values_MQ).all(1))
        if len(bad):
            raise NumericalError(
                f"a measurement is no number: got that of model {bad[0]}; train it again with a lower rate"
            )
        seed_M = np.zeros(len(masks_MN), np.int64) if seeds is None else np.asarray(seeds, np.int64)
        names = queries or [f"q{i}" for i in range(values_MQ.shape[1])]
        if len(names) != values_MQ.shape[1] or seed_M.shape != (len(masks_MN),):
            raise MismatchError(
                f"names or seeds do not fit the values: got {len(names)} names and {len(seed_M)} seeds for the shape "
                f"{values_MQ.shape}; give one for each query, and one for each model"
            )
        return cls(masks_MN.astype(bool), values_MQ, seed_M, names)

    @classmethod
    def read(cls, path: str | Path) -> "Bank":
        """Read a bank: the folder that `retrain` wrote, or somebody's ``.parquet`` or ``.npz`` file.

        Raises:
            MismatchError: another layout.
            StorageError: it cannot be read, or is damaged.
        """
        path = Path(path)
        if path.is_dir():
            if not (path / "manifest.json").exists():
                raise MismatchError(
                    f"no finished bank: got {path}; give `retrain` the same call again, which goes on with it"
                )
            path = path / "bank.parquet"
            check(path)
        try:
            return cls._npz(path) if path.suffix == ".npz" else cls._parquet(path)
        except KeyError as error:
            raise MismatchError(f"{path} is no bank: it has no {error}; give {LAYOUT}") from error
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise StorageError(f"cannot read the bank {path}: {error}; give {LAYOUT}") from error

    @classmethod
    def _npz(cls, path: Path) -> "Bank":
        with np.load(path, allow_pickle=False) as found:
            queries = found["queries"].tolist() if "queries" in found else None
            return cls.of(found["masks"], found["values"], found.get("seed"), queries)

    @classmethod
    def _parquet(cls, path: Path) -> "Bank":
        with open(path, "rb") as source:
            table = pq.read_table(source)
        lists = (table.column(name).combine_chunks().flatten() for name in ("masks", "values"))
        masks, values = (x.to_numpy(zero_copy_only=False).reshape(len(table), -1) for x in lists)
        seeds = table.column("seed").to_numpy() if "seed" in table.column_names else None
        names = (table.schema.metadata or {}).get(b"queries")
        return cls.of(masks, values, seeds, names.decode().split("\n") if names else None)

    def write(self, path: Path) -> None:
        """Write ``subset, seed, masks, values``, a row for each model, into a Parquet file."""
        columns = {
            "subset": self.subsets()[1],
            "seed": self.seed_M,
            "masks": pa.array(list(self.masks_MN), pa.list_(pa.bool_())),
            "values": pa.array(list(self.values_MQ), pa.list_(pa.float64())),
        }
        table = pa.table(columns).replace_schema_metadata({"queries": "\n".join(self.queries)})
        with open(path, "wb") as sink:
            pq.write_table(table, sink)

    def subsets(self) -> tuple[np.ndarray, np.ndarray]:
        """The different subsets, bool ``[S, N]`` as they come first, and which of them each model was trained on, ``[M]``."""
        _, first_S, number_M = np.unique(
            np.packbits(self.masks_MN, axis=1), axis=0, return_index=True, return_inverse=True
        )
        order_S = np.argsort(first_S)
        return self.masks_MN[first_S[order_S]], np.argsort(order_S)[number_M.ravel()]


class Lds(NamedTuple):
    """The mean over queries with its interval, and every query's own; it is 0 where ``f`` or its prediction never changes."""

    mean: float
    low: float
    high: float
    each_Q: np.ndarray

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def lds(
    bank: Bank,
    scores: np.ndarray | pd.DataFrame,
    *,
    quantile: float | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Lds:
    """Rank correlation, for each query, of the measured ``f`` with the sum of the scores over each subset.

    Scores are positive where a sequence raises ``f``.  The seeds of a subset are averaged, and the interval is that of a
    bootstrap over queries.

    Args:
        scores: ``[N, Q]``, or the frame of a trace (``result.frame()``), whose columns are found by the names of the queries.
        quantile: instead of the mean over seeds take this quantile of them (QLD): 0.5 is the median, which a run gone astray does
            not move; 0.1 asks whether the scores tell what the worse runs do.

    Raises:
        MismatchError: the scores are not of the bank's sequences and queries.
        ConfigError: fewer than three subsets, or a quantile or confidence that is none.

    Example:
        >>> print(up.lds(up.Bank.read("bank"), result.frame()))
        0.412 [0.377, 0.449]
    """
    if not 0 < confidence < 1 or (quantile is not None and not 0 <= quantile <= 1):
        raise ConfigError(f"shares are between 0 and 1: got the confidence {confidence} and the quantile {quantile}")
    masks_SN, subset_M = bank.subsets()
    if len(masks_SN) < 3:
        raise ConfigError(f"ranks need at least three different subsets: got {len(masks_SN)}; train on more")
    scores_NQ = _scores(bank, scores)
    by_subset = pd.DataFrame(bank.values_MQ).groupby(subset_M)
    f_SQ = np.asarray(by_subset.mean() if quantile is None else by_subset.quantile(quantile))
    each_Q = _rank_correlations(f_SQ, masks_SN.astype(np.float64) @ scores_NQ)
    drawn = np.random.default_rng(seed).integers(len(each_Q), size=(resamples, len(each_Q)))
    low, high = np.quantile(each_Q[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Lds(float(each_Q.mean()), float(low), float(high), each_Q)


def _scores(bank: Bank, scores: np.ndarray | pd.DataFrame) -> np.ndarray:
    N, Q = bank.masks_MN.shape[1], bank.values_MQ.shape[1]
    if isinstance(scores, pd.DataFrame):
        missing = [name for name in ("sequence", *bank.queries) if name not in scores]
        if missing or sorted(scores["sequence"]) != list(range(N)):
            what = f"no column {missing[0]!r}" if missing else f"{len(scores)} rows"
            raise MismatchError(
                f"the scores are not of the bank's {N} sequences and {Q} queries: got {what}; "
                "score every sequence, without candidates, and the queries of the bank"
            )
        scores = scores.sort_values("sequence")[bank.queries].to_numpy()
    scores_NQ = np.asarray(scores, np.float64)
    if scores_NQ.shape != (N, Q) or not np.isfinite(scores_NQ).all():
        raise MismatchError(
            f"scores are finite numbers [{N}, {Q}], for the bank's sequences and queries: got the shape {scores_NQ.shape}"
        )
    return scores_NQ


def _rank_correlations(x_SQ: np.ndarray, y_SQ: np.ndarray) -> np.ndarray:
    """Spearman's, column by column; 0 where one of the two is constant."""
    x_SQ, y_SQ = (rankdata(z, axis=0) - (len(z) + 1) / 2 for z in (x_SQ, y_SQ))
    scale_Q = np.sqrt((x_SQ**2).sum(0) * (y_SQ**2).sum(0))
    return (x_SQ * y_SQ).sum(0) / np.where(scale_Q > 0, scale_Q, 1)
