"""A run's passes, operations, time, memory and disk, before anything starts: pure arithmetic over plain data.

    plan = plan_run(Request(sequences=10_000_000, tokens=512), shape, machine)
    for line in describe(plan): print(line)

One floating-point multiplication and its addition are two operations (FLOP).  Operations come from :mod:`upriver.runtime.counts`,
the division of the work from :mod:`upriver.runtime.split`, speeds from :mod:`upriver.runtime.hardware`.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from upriver.errors import ConfigError
from upriver.runtime import counts
from upriver.runtime.counts import Shape
from upriver.runtime.hardware import DEFAULT_SHARE, LIBRARIES, Machine, show_bytes
from upriver.runtime.split import ITEM, SUM, Asked, FitSplit, Job, TraceSplit, factors_of, split_fit, split_trace

UNIT_TOKENS = 65_536  # after so many the sums of a pass go to disk
PAYS = 1.2  # bfloat16 products this much faster than float32 ones: recommended
SAMPLE = 64  # random sequences rescored with the top; and at the end of a fit as many at most are scored on each other
SHARE = 16  # but no more than one of so many that were fitted on
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
    batch_tokens: int = 4096
    batch_sequences: int = 0  # in the batch with most; 0: all are as long as the longest
    memory: int | None = None  # bytes; None: 80 % of what is available
    fit: bool = True

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


class Plan(NamedTuple):
    """What a run will take; ``fit`` and ``trace`` say how the work is divided."""

    request: Request
    machine: str
    devices: int
    spread: int  # devices that one copy of the model needs
    limit: int
    start: float  # seconds
    started: int  # bytes in use at most until then
    passes: list[Pass]
    fit: FitSplit | None
    trace: TraceSplit | None
    disk: dict[str, int]
    advice: list[str]

    def seconds(self, verb: str) -> float:
        return self.start + sum(p.seconds for p in self.passes if p.verb == verb)

    def peak(self, verb: str) -> int:
        return max([self.started, *(p.peak for p in self.passes if p.verb == verb)])

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        verbs = sorted({p.verb for p in self.passes})
        return {
            "machine": self.machine,
            "devices": self.devices,
            "devices_for_one_copy": self.spread,
            "memory_limit": self.limit,
            "start_seconds": self.start,
            "seconds": {verb: self.seconds(verb) for verb in verbs},
            "peak_bytes": {verb: self.peak(verb) for verb in verbs},
            "passes": [p._asdict() for p in self.passes],
            "fit": self.fit and self.fit._asdict(),
            "trace": self.trace and self.trace._asdict(),
            "disk_bytes": self.disk,
            "advice": self.advice,
        }


def parse_sizes(text: str) -> tuple[int, int] | None:
    """``10000000x512`` as sequences and tokens of each; None where the text is something else."""
    match = re.fullmatch(r"([1-9][\d_]*)x([1-9]\d*)", text)
    return (int(match[1].replace("_", "")), int(match[2])) if match else None


def plan_run(request: Request, shape: Shape, machine: Machine) -> Plan:
    """Plan a fit and a trace.

    Raises:
        ConfigError: they cannot be kept within the memory; the sentence says what would do.
    """
    if not shape.layers:
        raise ConfigError("nothing to plan: got no tracked layer; choose some with --layers")
    spread, limit, fit, trace = _divide(request, shape, machine)
    passes: list[Pass] = []
    if fit:
        passes += _Passes(request, shape, machine, request.dtype).fit(fit)
    if trace:
        passes += _Passes(request, shape, machine, request.scan).trace(trace)
    disk = _disk(request, shape)
    advice = _advice(request, machine, spread)
    return Plan(
        request,
        machine.name,
        machine.devices,
        spread,
        limit,
        machine.start,
        machine.peak,
        passes,
        fit,
        trace,
        disk,
        advice,
    )


def smallest_batch(request: Request, shape: Shape, machine: Machine) -> int:
    """Tokens of the smaller of the batches that fit and trace are divided into; nothing of it depends on the machine's rates.

    Raises:
        ConfigError: they cannot be kept within the memory; the sentence says what would do.
    """
    return min(split.batch_tokens for split in _divide(request, shape, machine)[2:] if split)


def _divide(r: Request, shape: Shape, machine: Machine) -> tuple[int, int, FitSplit | None, TraceSplit | None]:
    """Splits for the fewest devices to a copy of the model with which they keep the limit."""
    here = machine.resident is not None
    one = r.memory or (machine.memory if here else int(DEFAULT_SHARE * machine.memory))
    failed: ConfigError | None = None
    for spread in (n for n in range(1, machine.devices + 1) if machine.devices % n == 0):
        try:
            limit = spread * one
            fit = split_fit(shape, _job(r, shape, machine, limit, r.dtype)) if r.fit else None
            asked = Asked(r.queries, r.query_tokens, r.rank)
            trace = split_trace(shape, asked, _job(r, shape, machine, limit, r.scan)) if r.queries else None
            return spread, limit, fit, trace
        except ConfigError as error:
            failed = error
    assert failed is not None
    raise failed


def _job(r: Request, shape: Shape, machine: Machine, limit: int, dtype: str) -> Job:
    """The model is there as it was loaded, for queries and the second look; another compute type is a copy beside it."""
    resident = LIBRARIES + SUM * shape.parameters if machine.resident is None else machine.resident
    copy = ITEM[dtype] * shape.parameters if dtype != machine.loaded else 0
    return Job(limit, resident, r.batch_tokens, r.longest_tokens, dtype, machine.cores, r.batch_sequences, copy)


class _Passes:
    """Operations and seconds of each pass, in one compute type."""

    def __init__(self, request: Request, shape: Shape, machine: Machine, dtype: str):
        self.r, self.shape, self.machine = request, shape, machine
        self.rates, self.exact = machine.of(dtype), machine.of("float32")
        self.layers, self.T = shape.layers, request.tokens

    def model(self, layers: Any = None) -> float:
        """Operations a token, forward and backward to the lowest of ``layers``."""
        return 2 * (self.shape.forward(self.T) + self.shape.backward(self.T, layers))

    def fit(self, split: FitSplit) -> list[Pass]:
        tokens = min(self.r.fit_tokens, self.r.sequences * self.T)
        last = self.correction(split, tokens)
        sample = self.correction(split, max(8, min(SAMPLE, tokens / self.T // SHARE)) * self.T)
        agreement = sample._replace(
            name="agreement", moved=0.0, peak=split.peak["agreement"],
            seconds=sample.seconds - sample.moved / self.machine.disk,
        )  # fmt: skip
        return [self.covariance(split, tokens), self.eigen(split), last, agreement]

    def covariance(self, split: FitSplit, tokens: float) -> Pass:
        through = tokens * self._through(split.covariance)
        sums = 2 * tokens * sum(map(counts.covariance, self.layers))
        size = SUM * sum(x.O**2 + (x.I**2 if counts.leads(x) else 0) for x in self.layers)
        moved = size * (1 + 2 * max(0.0, tokens / UNIT_TOKENS - 1))
        seconds = through / self.rates.model + sums / self.rates.symmetric
        return self._pass(
            "covariance", "fit", len(split.covariance), tokens, through + sums, moved, seconds, split.peak
        )

    def eigen(self, split: FitSplit) -> Pass:
        cubes = sum(float(n) ** 3 for x in self.layers for n in ([x.O, x.I] if counts.leads(x) else [x.O]))
        size = SUM * sum(x.O**2 + (x.I**2 if counts.leads(x) else 0) for x in self.layers)
        seconds = self.machine.eigen * cubes / split.eigen_workers
        return self._pass("eigendecomposition", "fit", 0, 0, 9 * cubes, 2 * size, seconds, split.peak)

    def correction(self, split: FitSplit, tokens: float) -> Pass:
        through = tokens * self._through(split.correction)
        ways = [counts.correction(x, self.T) for x in self.layers]
        turned = 2 * tokens * sum(w.cheapest - w.gradient for w in ways)
        formed = 2 * tokens * sum(w.gradient for w in ways)
        entries = tokens / self.T * sum(x.O * x.I for x in self.layers)
        seconds = through / self.rates.model + turned / self.rates.product + formed / self.rates.gradient
        seconds += MOVES * SUM * entries / self.rates.bandwidth
        moved = 3 * SUM * sum(x.O * x.I for x in self.layers) + SUM * sum(x.O**2 + x.I**2 for x in self.layers)
        flop = through + turned + formed + 4 * entries
        return self._pass("correction", "fit", len(split.correction), tokens, flop, moved, seconds, split.peak)

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
        chosen = counts.contraction(self.layers, M, N, Q, r.rank, float(split.dense_bytes))
        work, entries = 0.0, 0.0
        for x in self.layers:
            order = chosen.orders[x.name]
            costs = counts.orders(x.O, x.I, M, N, Q, r.rank or 1)
            again = (costs.rebuilt - costs.dense) * (1 - 1 / chosen.hold) if order == "rebuilt" else 0.0
            work += (getattr(costs, order) - again) / M
            entries += self._touched(x, order, M, N, Q) / M
        flop = passes * tokens * (self.model() + 2 * work)
        seconds = self.model() / self.rates.model + 2 * work / self.rates.gradient
        seconds += ITEM[r.scan] * entries / self.rates.bandwidth
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

    def _through(self, groups: list[list[int]]) -> float:
        return sum(self.model([self.layers[i] for i in group]) for group in groups)

    def _factors(self) -> float:
        """Bytes of bases and eigenvalues on disk."""
        bases = sum(x.O**2 + (x.I**2 if counts.leads(x) else 0) + x.O * x.I for x in self.layers)
        return float(SUM * bases)

    def _pass(
        self, name: str, verb: str, sweeps: int, tokens: float, flop: float, moved: float, seconds: float, peak: dict
    ) -> Pass:
        total = seconds / self.machine.devices + moved / self.machine.disk
        return Pass(name, verb, sweeps, tokens, flop, moved, total, peak[name])


def _portions(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _disk(r: Request, shape: Shape) -> dict[str, int]:
    layers = shape.layers
    bases = SUM * sum(x.O**2 + (x.I**2 if counts.leads(x) else 0) for x in layers)
    sizes: dict[str, int] = {}
    if r.fit:
        sizes["factors"] = bases + SUM * sum(x.O * x.I for x in layers)
        sizes["while fitting"] = bases + 2 * SUM * sum(x.O * x.I for x in layers)
    if r.queries:
        sizes["solved queries"] = SUM * r.queries * factors_of(layers, Asked(r.queries, r.query_tokens, r.rank))
        sizes["scores"] = 2 * SUM * r.queries * r.sequences
    return sizes


def _advice(r: Request, machine: Machine, spread: int) -> list[str]:
    lines = []
    if machine.low_precision >= PAYS and "bfloat16" not in (r.dtype, r.scan):
        lines.append(
            f"bfloat16 pays here: its products are {machine.low_precision:.1f} times as fast (--dtype bfloat16)"
        )
    if spread > 1:
        lines.append(f"one copy of the model needs {spread} devices; copies side by side: {machine.devices // spread}")
    return lines


def describe(plan: Plan) -> list[str]:
    """The plan in short lines: a table of passes, the totals, and what is recommended."""
    width = 20
    lines = [f"{'pass':<{width}}{'times over':>18}{'operations':>14}{'time':>12}{'peak memory':>14}"]
    for p in plan.passes:
        over = f"{p.sweeps} x {_count(p.tokens)}" if p.tokens else "-"
        peak = show_bytes(p.peak / plan.spread)
        lines.append(f"{p.name:<{width}}{over:>18}{show_flop(p.flop):>14}{show_seconds(p.seconds):>12}{peak:>14}")
    for verb in dict.fromkeys(p.verb for p in plan.passes):
        flop = show_flop(sum(p.flop for p in plan.passes if p.verb == verb))
        peak = show_bytes(plan.peak(verb) / plan.spread)
        lines.append(f"{verb:<{width}}{'':>18}{flop:>14}{show_seconds(plan.seconds(verb)):>12}{peak:>14}")
    lines.append("disk: " + ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.disk.items()))
    limit = show_bytes(plan.limit / plan.spread)
    device = f"each of {plan.devices} devices" if plan.devices > 1 else "memory"
    lines.append(
        f"plan: {plan.machine}, {device} limited to {limit}, {show_seconds(plan.start)} to start" + _batches(plan)
    )
    return lines + plan.advice


def _batches(plan: Plan) -> str:
    tokens = dict.fromkeys(split.batch_tokens for split in (plan.fit, plan.trace) if split)
    return f", batches of {' and '.join(f'{t:,}' for t in tokens)} tokens"


def _count(n: float) -> str:
    unit, name = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if n >= u), (1, ""))
    return f"{n / unit:.3g}{name} tokens"


def show_flop(n: float) -> str:
    unit, name = next(
        ((u, s) for u, s in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")) if n >= u), (1e6, "M")
    )
    return f"{n / unit:.3g} {name}FLOP"


def show_seconds(s: float) -> str:
    if s < 99.5:
        return f"{s:.2g} s" if s < 9.95 else f"{s:.0f} s"
    return next(f"{s / u:.3g} {name}" for u, name in ((86400, "days"), (3600, "h"), (60, "min")) if s >= u)
