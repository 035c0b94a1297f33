"""What is asked of a plan, and the operations, bytes and seconds of each pass that follow: pure arithmetic over plain data."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from upriver.runtime import counts
from upriver.runtime.config import BATCH_TOKENS, MIXED
from upriver.runtime.counts import Shape
from upriver.runtime.hardware import Machine
from upriver.runtime.split import (
    HANDED,
    SUM,
    Asked,
    FitSplit,
    Keeping,
    TraceSplit,
    covariance_size,
    factors_of,
    keeping,
)

UNIT_TOKENS = (
    65_536  # work that a kill can cost; with it artifact.SCHEMA must change: a run in progress counts in units
)
SAMPLE = 64  # random sequences rescored with the top; and as many at most are scored on each other at the end of a fit
SHARE = 16  # of so many that were fitted on one is, but a few at least
FLOAT32_EIGEN = 0.75  # of the time that an eigendecomposition takes in float64
MOVES = 6  # numbers read or written for each entry of a sequence's gradient that is squared and summed


def request_for(lengths_N: Any, **asked: Any) -> "Request":
    """A request over sequences of these lengths."""
    return Request(len(lengths_N), float(lengths_N.mean()), int(lengths_N.max()), **asked)


@dataclass(frozen=True)
class Request:
    """What is to be planned: a fit, and a trace when there are queries."""

    sequences: int
    tokens: float  # of a sequence, mean
    longest: int = 0  # 0: as the mean
    fit_tokens: int = 1_000_000
    queries: int = 0
    query_tokens: int = 32
    rank: int | None = 32  # None: full
    top: int = 100
    dtype: str = "float32"
    scan_dtype: str = ""  # as dtype
    batch_tokens: int = BATCH_TOKENS
    batch_sequences: int = 0  # in the batch with most; 0: all are as long as the longest
    memory: int | None = None  # bytes; None: 80 % of what is available
    fit: bool = True
    own_labels: bool = False  # the corpus's own, the same in both passes (empirical Fisher)
    rounds: bool = False  # more and more of the sample, until its halves agree: planned to the end of it
    layer_scores: bool = False
    space: int | None = None  # bytes free where the factors go; None: as on the machine's disk

    @property
    def longest_tokens(self) -> int:
        return self.longest or int(self.tokens + 0.999)

    @property
    def scan(self) -> str:
        return self.scan_dtype or self.dtype

    @property
    def dtypes(self) -> list[str]:
        """The compute types of what is asked for."""
        return [self.dtype] * self.fit + [self.scan] * (self.queries > 0)

    @property
    def narrow(self) -> bool:
        """Whether bfloat16 is asked for already, somewhere."""
        return not {"bfloat16", MIXED}.isdisjoint(self.dtypes)


def doublings(tokens: float, first: int = UNIT_TOKENS) -> list[float]:
    """The sizes of a sample that begins with ``first`` tokens and doubles up to ``tokens``."""
    sizes = [float(first)]
    while sizes[-1] < tokens:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], float(tokens)]


def compared(fitted: float, at_once: int) -> int:
    """Sequences that are scored on each other, ``at_once`` in a batch, at the end of a fit on ``fitted`` of them."""
    return max(8, 32 // at_once, min(SAMPLE, int(fitted) // SHARE))


class Pass(NamedTuple):
    """One stage of a run."""

    name: str
    verb: str  # fit or trace
    sweeps: int  # times over its data
    tokens: float  # in one sweep
    flop: float
    moved: float  # bytes to and from disk
    seconds: float
    peak: int  # bytes, all devices of one copy of the model together


class Passes:
    """Operations and seconds of each pass, in one compute type."""

    def __init__(self, request: Request, shape: Shape, machine: Machine, dtype: str, copies: int = 1):
        self.r, self.shape, self.machine, self.copies = request, shape, machine, copies
        self.rates, self.exact, self.dtype = machine.of(dtype), machine.of("float32"), dtype
        self.layers, self.T = shape.layers, request.tokens

    def model(self, layers: Any = None) -> float:
        """Operations a token, forward and backward to the lowest of ``layers``."""
        return 2 * (self.shape.forward(self.T) + self.shape.backward(self.T, layers))

    @property
    def fitted(self) -> float:
        """Tokens of the sample."""
        return min(self.r.fit_tokens, self.r.sequences * self.T)

    def keeping(self, split: FitSplit) -> Keeping:
        """What is kept, where writing and reading it takes less time than the model."""
        r, space = self.r, self.machine.space if self.r.space is None else self.r.space
        found = keeping(self.shape, split, self.fitted, r.dtype, r.own_labels, r.rounds, space)
        passes = [(self.covariance(split, k), self.correction(split, k)) for k in (found, None)]
        faster = sum(p.seconds for p in passes[0]) < sum(p.seconds for p in passes[1])
        return found if faster else found._replace(covariance=False, correction=False, size=0)

    def fit(self, split: FitSplit) -> list[Pass]:
        kept = self.keeping(split)
        few = min(self.r.sequences, compared(self.fitted / self.T, split.compared))
        sample = self.correction(split, None, few * self.T)
        agreement = sample._replace(
            name="agreement", moved=0.0, peak=split.peak["agreement"],
            seconds=sample.seconds - sample.moved / self.machine.disk,
        )  # fmt: skip
        again = [self.eigen(split), self.correction(split, kept), agreement]
        return [self.covariance(split, kept), *(self._in_rounds(p) for p in again)]

    def _in_rounds(self, p: Pass) -> Pass:
        """A pass in every round: the correction goes over the sample so far again, the others cost the same each time."""
        sizes = doublings(self.fitted) if self.r.rounds else [self.fitted]
        times = sum(sizes) / self.fitted if p.name == "correction" else len(sizes)
        return p._replace(flop=times * p.flop, moved=times * p.moved, seconds=times * p.seconds)

    def covariance(self, split: FitSplit, kept: Keeping | None) -> Pass:
        tokens, groups = self.fitted, split.covariance
        through = tokens * (self.model() if kept and kept.covariance else self._through(groups))
        sums = 2 * tokens * sum(map(counts.covariance, self.layers))
        moved = self._added_up(covariance_size(self.layers), tokens)
        if kept and kept.covariance:
            moved += _through_disk(kept) * (1 if len(groups) == 1 else 2)
        seconds = through / self.rates.model + sums / self.rates.symmetric
        return self._pass("covariance", "fit", len(groups), tokens, through + sums, moved, seconds, split.peak)

    def eigen(self, split: FitSplit) -> Pass:
        cubes = sum(float(n) ** 3 for x in self.layers for n in ([x.O, x.I] if counts.leads(x) else [x.O]))
        size = covariance_size(self.layers)  # as large as the bases
        each = self.machine.eigen * (FLOAT32_EIGEN if self.dtype == "bfloat16" else 1.0)
        seconds = each * cubes / split.eigen_workers
        return self._pass("eigendecomposition", "fit", 0, 0, 9 * cubes, 2 * size, seconds, split.peak)

    def correction(self, split: FitSplit, kept: Keeping | None, tokens: float | None = None) -> Pass:
        tokens, groups = tokens or self.fitted, split.correction
        through = tokens * self._through(groups)
        lam, bases = SUM * sum(x.O * x.I for x in self.layers), SUM * sum(x.O**2 + x.I**2 for x in self.layers)
        moved = self._added_up(2 * lam, tokens) + lam + bases
        if kept and kept.correction:
            through = 0.0 if kept.one else tokens * self.model()
            moved += _through_disk(kept) * (1 if kept.one else 2)
        ways = [counts.correction(x, self.T) for x in self.layers]
        turned = 2 * tokens * sum(w.cheapest - w.gradient for w in ways)
        formed = 2 * tokens * sum(w.gradient for w in ways)
        entries = tokens / self.T * sum(x.O * x.I for x in self.layers)
        seconds = through / self.rates.model + turned / self.rates.product + formed / self.rates.gradient
        seconds += MOVES * SUM * entries / self.rates.bandwidth
        flop = through + turned + formed + 4 * entries
        return self._pass("correction", "fit", len(groups), tokens, flop, moved, seconds, split.peak)

    def trace(self, split: TraceSplit) -> list[Pass]:
        return [self.queries(split), self.scan(split), self.rescore(split)]

    def queries(self, split: TraceSplit) -> Pass:
        Q, t, R = self.r.queries, self.r.query_tokens, self.r.rank
        through = Q * t * self.model()
        solving = 2.0 * Q * sum(counts.solve(x, t, R) for x in self.layers)
        chunks = -(-Q // split.solve_queries)
        asked = Asked(Q, t, R)
        moved = chunks * self._factors() + SUM * Q * factors_of(self.layers, asked)
        seconds = through / self.exact.model + solving / self.exact.product
        return self._pass("queries", "trace", chunks, Q * t / chunks, through + solving, moved, seconds, split.peak)

    def scan(self, split: TraceSplit) -> Pass:
        r, Q = self.r, split.scan_queries
        passes = -(-r.queries // Q)
        tokens = r.sequences * self.T
        M = min(split.batch_tokens, tokens)
        N = max(1.0, M / self.T)
        asked = (Q, r.rank, split.dense_bytes, HANDED[r.scan], self.machine.accelerator, split.token_bytes)
        chosen = counts.contraction(self.layers, M, N, *asked)
        work, entries = 0.0, 0.0
        for x in self.layers:
            order = chosen.orders[x.name]
            costs = counts.orders(x.O, x.I, M, N, Q, r.rank or 1)
            again = (costs.rebuilt - costs.dense) * (1 - 1 / chosen.hold) if order == "rebuilt" else 0.0
            work += (getattr(costs, order) - again) / M
            entries += self._touched(x, order, M, N, Q) / M
        flop = passes * tokens * (self.model() + 2 * work)
        seconds = self.model() / self.rates.model + 2 * work / self.rates.gradient
        seconds += HANDED[r.scan] * entries / self.rates.bandwidth
        moved = 4.0 * r.sequences * r.queries
        return self._pass("scan", "trace", passes, tokens, flop, moved, passes * tokens * seconds, split.peak)

    def _touched(self, x: Any, order: str, M: float, N: float, Q: int) -> float:
        """Numbers that a batch reads and writes beside its products."""
        if order == "tokens":
            return 3 * M * Q * (self.r.rank or 1)
        return 2 * N * x.O * x.I + Q * x.O * x.I * (1 if order == "dense" else 3)

    def rescore(self, split: TraceSplit) -> Pass:
        r = self.r
        pairs, sample = min(r.sequences, 2 * r.top + SAMPLE), min(SAMPLE, r.sequences)
        together = max(1, min(split.rescore_queries, int(UNIT_TOKENS / (pairs * self.T))))
        chunks = -(-r.queries // together)
        rows = sum(min(r.sequences, n * (pairs - sample) + sample) for n in _portions(r.queries, together))
        tokens = rows * self.T + r.queries * r.query_tokens
        through = tokens * self.model()
        each = 2.0 * r.queries * sum(counts.rescore(x, r.query_tokens, self.T, pairs) for x in self.layers)
        seconds = through / self.exact.model + each / self.exact.product
        flop, moved = through + each, chunks * self._factors()
        return self._pass("rescore", "trace", chunks, tokens / chunks, flop, moved, seconds, split.peak)

    def _added_up(self, size: int, tokens: float) -> float:
        """Bytes read and written for sums.

        One process reads and writes the sum after every unit; several also write each unit, and the sum once for about as
        many units as there are processes; a process alone on an accelerator keeps the sum in memory.
        """
        units = max(1.0, tokens / UNIT_TOKENS)
        if self.copies > 1:
            return 2 * size * units * (1 + 1 / self.copies)
        return float(size) if self.machine.accelerator else size * (2 * units - 1)

    def _through(self, groups: list[list[int]]) -> float:
        return sum(self.model([self.layers[i] for i in group]) for group in groups)

    def _factors(self) -> float:
        """Bytes of bases and eigenvalues on disk."""
        return float(covariance_size(self.layers) + SUM * sum(x.O * x.I for x in self.layers))

    def _pass(
        self, name: str, verb: str, sweeps: int, tokens: float, flop: float, moved: float, seconds: float, peak: dict
    ) -> Pass:
        total = seconds / self.machine.devices + moved / self.machine.disk
        return Pass(name, verb, sweeps, tokens, flop, moved, total, peak[name])


def _through_disk(kept: Keeping) -> float:
    """Bytes of what one pass sees, written or read once."""
    return kept.size / (1 if kept.one else kept.covariance + kept.correction)


def _portions(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
