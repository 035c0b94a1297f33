"""A run's passes, operations, time, memory and disk, before anything starts: pure arithmetic over plain data.

    plan = plan_run(Request(sequences=10_000_000, tokens=512), shape, machine)
    for line in describe(plan): print(line)

One floating-point multiplication and its addition are two operations (FLOP).  What passes hold and multiply stands in
:mod:`upriver.runtime.cost`, the division of the work in :mod:`upriver.runtime.divide`.  Speeds are those of this machine, from
one batch of each pass (:mod:`upriver.model.planned`), or of one in ``hardware.toml`` that need not be there.
"""

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from upriver.errors import ConfigError
from upriver.runtime.config import BATCH_TOKENS, COMMIT_SHARE, HELD_OUT, MIXED, UNIT_TOKENS, weights_in
from upriver.runtime.cost import (
    CORRECTION,
    COVARIANCE,
    ITEM,
    SUM,
    Asked,
    Shape,
    lam_size,
    moments_size,
    orders,
    rotations,
    sides,
    solved_size,
    solving,
)
from upriver.runtime.divide import SEQUENCE_BYTES, Budget, Division, divide_fit, divide_trace, scan_held
from upriver.runtime.hardware import EIGEN_OPERATIONS, Machine, Rates
from upriver.runtime.progress import show_bytes, show_count, show_flop, show_seconds
from upriver.runtime.system import DEFAULT_SHARE

LIBRARIES = 1_000_000_000  # bytes: Python, torch and a device's context, where nothing could be measured
FLOAT32_EIGEN = 0.75  # of the time that an eigendecomposition takes in float64
PAYS = 1.2  # times as fast in bfloat16, the run as a whole: recommended
SAMPLE = 64  # random sequences rescored with the top
FORWARD_MODE = 2  # times a forward pass that a derivative along a direction takes


@dataclass(frozen=True)
class Request:
    """What is to be planned: a fit, and a trace when there are queries."""

    sequences: int
    tokens: float  # of a sequence, mean
    longest: int = 0  # 0: as the mean
    fit_tokens: int = 1_000_000
    queries: int = 0
    columns: int = 0  # of the scan: the queries, for each damping; 0: as many as queries
    query_tokens: int = 32
    rank: int | None = 32  # None: full
    top: int = 100
    refine: int = 0  # products of an iterative solver for each query
    refine_tokens: int = 0  # that one of them goes over; 0: the sample
    held_out: int | None = None
    draws: int = 1  # passes of a fit with each batch
    blocks: int = 1  # of second moments, along their diagonals
    dtype: str = "float32"
    scan_dtype: str = ""  # as dtype
    batch_tokens: int = BATCH_TOKENS
    batch_sequences: int = 0  # in the batch with most; 0: all are as long as the longest
    memory: int | None = None  # bytes; None: 80 % of what is available
    fit: bool = True
    rounds: bool = False  # more and more of the sample, until its halves agree: planned to the end of it
    layer_scores: bool = False
    norms: int = 0  # dampings of unit-norm scores

    @property
    def longest_tokens(self) -> int:
        return self.longest or int(self.tokens + 0.999)

    @property
    def scan(self) -> str:
        return self.scan_dtype or self.dtype

    @property
    def fitted(self) -> float:
        """Tokens of the sample."""
        return min(self.fit_tokens, self.sequences * self.tokens)

    @property
    def asked(self) -> Asked:
        return Asked(self.columns or self.queries, self.query_tokens, self.rank, self.layer_scores, self.norms)


def request_for(lengths_N: Any, **asked: Any) -> Request:
    """A request over sequences of these lengths."""
    return Request(len(lengths_N), float(lengths_N.mean()), int(lengths_N.max()), **asked)


def held_out_tokens(asked: int | None, queries: int) -> int:
    """Tokens that the solutions are judged on: as asked for, or fewer of them for more questions."""
    most, questions = HELD_OUT
    return asked if asked is not None else most * questions // max(questions, queries)


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
    machine: Machine
    spread: int  # devices that one copy of the model needs
    limit: int
    passes: list[Pass]
    fit: Division | None
    trace: Division | None
    disk: dict[str, int]
    advice: list[str]

    def seconds(self, verb: str) -> float:
        return self.machine.start + sum(p.seconds for p in self.passes if p.verb == verb)

    def peak(self, verb: str) -> int:
        return max([self.machine.peak, *(p.peak for p in self.passes if p.verb == verb)])

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        verbs = sorted({p.verb for p in self.passes})
        return {
            "machine": self.machine.name,
            "devices": self.machine.devices,
            "devices_for_one_copy": self.spread,
            "memory_limit": self.limit,
            "start_seconds": self.machine.start,
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


def plan_run(request: Request, shape: Shape, machine: Machine, division: Division | None = None) -> Plan:
    """Plan a fit and a trace.

    Args:
        division: of a fit or a trace that has divided its work already, and is planned alone.

    Raises:
        ConfigError: they cannot be kept within the memory; the sentence says what would do.
    """
    if not shape.layers:
        raise ConfigError("nothing to plan: got no tracked layer; choose some with --layers")
    if request.rank is not None:  # no layer can have a higher one
        request = replace(request, rank=min(request.rank, max(min(x.O, x.I) for x in shape.layers)))
    if division is None:
        spread, limit, fit, trace = _divide(request, shape, machine)
    else:
        spread, limit = 1, division.limit
        fit, trace = (division, None) if request.fit else (None, division)
    passes = _passes(request, shape, machine, fit, trace)
    advice = []
    if "bfloat16" in machine.rates and not {"bfloat16", MIXED} & {request.dtype, request.scan}:
        rough = replace(request, dtype="bfloat16", scan_dtype="bfloat16")
        faster = _total(passes) / max(1e-9, _total(_passes(rough, shape, machine, fit, trace)))
        advice = [f"bfloat16 pays here: about {faster:.1f} times as fast (--dtype bfloat16)"] if faster >= PAYS else []
    if spread > 1:
        advice += [f"one copy of the model needs {spread} devices; copies side by side: {machine.devices // spread}"]
    return Plan(request, machine, spread, limit, passes, fit, trace, _disk(request, shape, fit, machine), advice)


def _total(passes: list[Pass]) -> float:
    return sum(p.seconds for p in passes)


def budget_for(r: Request, shape: Shape, machine: Machine, limit: int, verb: str, exact: str = "float32") -> Budget:
    """A model that was loaded here is as it is; elsewhere it is loaded in the type of the fit or the scan.

    What another type takes more is there while queries are solved and the top is looked at again, and nowhere else.
    """
    dtype = r.dtype if verb == "fit" else r.scan
    held = machine.loaded if machine.resident is not None else weights_in(dtype)
    resident = LIBRARIES + ITEM[held] * shape.parameters if machine.resident is None else machine.resident
    copy, widened = (max(0, ITEM[weights_in(kind)] - ITEM[held]) * shape.parameters for kind in (dtype, exact))
    resident += 0 if machine.accelerator else SEQUENCE_BYTES * r.sequences
    longest, own = r.longest_tokens, machine.accelerator
    return Budget(
        limit, resident, r.batch_tokens, longest, dtype, machine.cores, r.batch_sequences, copy, exact, widened, own
    )


def _divide(r: Request, shape: Shape, machine: Machine) -> tuple[int, int, Division | None, Division | None]:
    """Divisions for the fewest devices to a copy of the model with which they keep the limit; where float32 does not fit, a
    scan in bfloat16 leaves queries and the second look in it too."""
    here = machine.resident is not None
    one = r.memory or (machine.memory if here else int(DEFAULT_SHARE * machine.memory))
    exact = ["float32", *(["bfloat16"] if r.scan == "bfloat16" and not r.refine else [])]
    failed: ConfigError | None = None
    spreads = [n for n in range(1, 2 if here else machine.devices + 1) if machine.devices % n == 0]
    for spread, kind in product(spreads, exact):
        try:
            limit = spread * one
            fit = divide_fit(shape, budget_for(r, shape, machine, limit, "fit")) if r.fit else None
            budget = budget_for(r, shape, machine, limit, "trace", kind)
            return spread, limit, fit, divide_trace(shape, r.asked, budget) if r.queries else None
        except ConfigError as error:
            failed = error
    assert failed is not None
    raise failed


def _passes(r: Request, shape: Shape, machine: Machine, fit: Division | None, trace: Division | None) -> list[Pass]:
    found = _fit_passes(r, shape, machine, fit) if fit else []
    return found + (_trace_passes(r, shape, machine, trace) if trace else [])


def _through(shape: Shape, T: float, groups: list[list[int]]) -> float:
    """Operations a token of passes through the model, each backward to the lowest layer of its group."""
    return sum(2 * (shape.forward(T) + shape.backward(T, [shape.layers[i] for i in group])) for group in groups)


def _fit_passes(r: Request, shape: Shape, machine: Machine, division: Division) -> list[Pass]:
    layers, T, tokens, rates = shape.layers, r.tokens, r.fitted, machine.of(r.dtype)
    sizes = (
        [tokens]
        if not r.rounds
        else [min(tokens, UNIT_TOKENS * 2.0**k) for k in range(64) if UNIT_TOKENS * 2.0 ** (k - 1) < tokens]
    )
    found = []
    for spec, again, size in (
        (COVARIANCE, 1.0, moments_size(layers)),
        (CORRECTION, sum(sizes) / tokens, 2 * lam_size(layers)),
    ):
        groups = division.groups[spec.name]
        through = r.draws * again * tokens * _through(shape, T, groups)
        work = r.draws * again * tokens * 2 * sum(spec.multiplications(x, T) for x in layers)
        computing = rates.seconds(spec.name, through, work) / machine.devices
        once = again * size * max(1, machine.devices)
        # sums are written after a unit where that takes little of the time, and at the end
        moved = min(once * max(1.0, tokens / UNIT_TOKENS), once + COMMIT_SHARE * computing * machine.disk)
        seconds = computing + moved / machine.disk
        found.append(
            Pass(
                spec.name,
                "fit",
                r.draws * len(groups),
                tokens,
                through + work,
                moved,
                seconds,
                division.peak[spec.name],
            )
        )
    cubes = len(sizes) * sum(float(n) ** 3 for x in layers for n in sides(x))
    each = machine.eigen * (FLOAT32_EIGEN if r.dtype == "bfloat16" else 1.0)
    seconds = each * cubes / division.eigen_workers / machine.devices
    eigen = Pass(
        "eigendecomposition", "fit", 0, 0, EIGEN_OPERATIONS * cubes, 0.0, seconds, division.peak["eigendecomposition"]
    )
    few = min(SAMPLE * T, tokens)
    share = few * len(sizes) / max(sum(sizes), 1) / r.draws
    last = found[1]
    agreement = last._replace(
        name="agreement",
        sweeps=len(division.groups["agreement"]),
        tokens=few,
        flop=share * last.flop,
        moved=0.0,
        seconds=share * last.seconds,
        peak=division.peak["agreement"],
    )
    return [found[0], eigen, last, agreement]


def _trace_passes(r: Request, shape: Shape, machine: Machine, division: Division) -> list[Pass]:
    layers, T, Q, t, asked = shape.layers, r.tokens, r.queries, r.query_tokens, r.asked
    exact, rates, everything = machine.of(division.exact), machine.of(r.scan), r.sequences * T
    asking, looking = (division.groups.get(name, division.groups["scan"]) for name in ("queries", "rescore"))
    found: list[Pass] = []

    def add(name: str, rates: Rates, sweeps: int, tokens: float, through: float, work: float, peak: str) -> None:
        seconds = rates.seconds(name, through, work) / machine.devices
        found.append(Pass(name, "trace", sweeps, tokens, through + work, 0.0, seconds, division.peak[peak]))

    add(
        "queries",
        exact,
        len(asking),
        Q * t,
        Q * t * _through(shape, T, asking),
        2.0 * asked.queries * sum(solving(x, t, r.rank) for x in layers),
        "queries",
    )
    if r.refine:
        some = r.refine_tokens or r.fitted
        one = Q * some * (FORWARD_MODE * shape.forward(T) + shape.backward(T) + shape.forward(T)) * 2
        add("refine", exact, r.refine, some, r.refine * one, 0.0, "queries")
    M, groups = min(division.batch_tokens, everything), division.groups["scan"]
    N, work = max(1.0, M / T), 0.0
    budget = budget_for(r, shape, machine, division.limit, "trace", division.exact)._replace(
        sequences=max(1, round(N)), batch_tokens=int(max(1, M))
    )
    for group in groups:
        chosen = scan_held([layers[i] for i in group], asked, budget, int(max(1, M)), division.scan_room)
        for i in group:
            x = layers[i]
            costs, order = orders(x.O, x.I, M * x.rows, N, asked.queries, r.rank or 1), chosen.orders[x.name]
            again = (costs.rebuilt - costs.dense) * (1 - 1 / chosen.hold) if order == "rebuilt" else 0.0
            work += (getattr(costs, order) - again) / M
            work += r.norms and rotations(x, T) + r.norms * x.O * x.I / T
    add("scan", rates, len(groups), everything, everything * _through(shape, T, groups), everything * 2 * work, "scan")
    pairs = min(r.sequences, 2 * r.top + SAMPLE)
    rows = min(Q * (pairs - SAMPLE) + SAMPLE, max(pairs, r.sequences)) if pairs > SAMPLE else pairs
    each = 2.0 * Q * sum(solving(x, t, None) + pairs * T * x.rows * x.O * (x.I + 1) for x in layers)
    tokens = rows * T + Q * t
    add("rescore", exact, len(looking), tokens, tokens * _through(shape, T, looking), each, "rescore")
    left = max(0.0, everything - r.fitted)
    if (
        division.exact != "bfloat16"
        and division.judged
        and (judged := min(held_out_tokens(None, Q), left) if r.held_out is None else float(r.held_out))
    ):
        add("judge", exact, 1, judged, 2 * 2 * Q * judged * FORWARD_MODE * shape.forward(T), 0.0, "judge")
    return found


def _disk(r: Request, shape: Shape, fit: Division | None, machine: Machine) -> dict[str, int]:
    """Bytes of what stays, and of the most that is there on the way."""
    layers, sizes = shape.layers, {}
    if fit:
        groups = {name: [[layers[i] for i in group] for group in found] for name, found in fit.groups.items()}
        first = max(moments_size(group) for group in groups["covariance"])
        sizes["factors"] = moments_size(layers) + lam_size(layers)
        sums = moments_size(layers) if r.rounds else first
        sizes["while fitting"] = (
            moments_size(layers) + machine.devices * max(sums, 2 * lam_size(layers)) + lam_size(layers)
        )
    if r.queries:
        sizes["solved queries"] = r.asked.queries * solved_size(layers, r.asked)
        table, by_layer = SUM * r.asked.queries * r.sequences, len(layers) * r.layer_scores
        sizes["scores"] = (2 + by_layer + bool(r.norms)) * table  # with the sums over documents
        sizes["while tracing"] = (3 + 2 * by_layer) * table  # the units of the scan are there besides
    return sizes


def describe(plan: Plan) -> list[str]:
    """The plan in short lines: a table of passes, the totals, and what is recommended."""
    width = 20
    lines = [f"{'pass':<{width}}{'times over':>18}{'operations':>14}{'time':>12}{'peak memory':>14}"]
    for p in plan.passes:
        over = f"{p.sweeps} x {show_count(p.tokens)}" if p.tokens else "-"
        peak = show_bytes(p.peak / plan.spread)
        lines.append(f"{p.name:<{width}}{over:>18}{show_flop(p.flop):>14}{show_seconds(p.seconds):>12}{peak:>14}")
    for verb in dict.fromkeys(p.verb for p in plan.passes):
        flop = show_flop(sum(p.flop for p in plan.passes if p.verb == verb))
        peak = show_bytes(plan.peak(verb) / plan.spread)
        name = "fit, at most" if verb == "fit" and plan.request.rounds else verb
        lines.append(f"{name:<{width}}{'':>18}{flop:>14}{show_seconds(plan.seconds(verb)):>12}{peak:>14}")
    lines.append("disk: " + ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.disk.items()))
    limit, devices = show_bytes(plan.limit / plan.spread), plan.machine.devices
    tokens = dict.fromkeys(division.batch_tokens for division in (plan.fit, plan.trace) if division)
    lines.append(
        f"plan: {plan.machine.name}, {f'each of {devices} devices' if devices > 1 else 'memory'} limited to {limit}, "
        f"{show_seconds(plan.machine.start)} to start, batches of {' and '.join(f'{t:,}' for t in tokens)} tokens"
    )
    if plan.trace and plan.trace.exact != plan.request.scan:
        lines.append(f"types: the scan in {plan.request.scan}, questions and the second look in {plan.trace.exact}")
    if plan.machine.accelerator:
        lines.append(
            "where: on the device the model, and sums, bases or solved questions of a group of layers; the others on the disk"
        )
    return lines + plan.advice
