"""A run's passes, operations, time, memory and disk, before anything starts: pure arithmetic over plain data.

    plan = plan_run(Request(sequences=10_000_000, tokens=512), shape, machine)
    for line in describe(plan): print(line)

One floating-point multiplication and its addition are two operations (FLOP).  Operations come from :mod:`upriver.runtime.counts`,
the division of the work from :mod:`upriver.runtime.split`, speeds from :mod:`upriver.runtime.hardware`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from upriver.errors import ConfigError
from upriver.runtime.config import weights_in
from upriver.runtime.counts import LayerSize, Shape
from upriver.runtime.hardware import LIBRARIES, Machine
from upriver.runtime.passes import UNIT_TOKENS, Pass, Passes, Request
from upriver.runtime.progress import show_bytes, show_count, show_flop, show_seconds
from upriver.runtime.split import (
    ITEM,
    SEQUENCE_BYTES,
    SUM,
    Asked,
    Budget,
    FitSplit,
    TraceSplit,
    covariance_size,
    factors_of,
    split_fit,
    split_trace,
)
from upriver.runtime.system import DEFAULT_SHARE

PAYS = 1.2  # times as fast in bfloat16, the run as a whole: recommended


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
            "fit": _division(self.fit),
            "trace": _division(self.trace),
            "disk_bytes": self.disk,
            "advice": self.advice,
        }


def _division(split: FitSplit | TraceSplit | None) -> dict[str, Any] | None:
    """How the work is divided, without the memory that it was divided for: the plan tells that itself."""
    return split and {name: value for name, value in split._asdict().items() if name != "made_for"}


def parse_sizes(text: str) -> tuple[int, int] | None:
    """``10000000x512`` as sequences and tokens of each; None where the text is something else."""
    match = re.fullmatch(r"([1-9][\d_]*)x([1-9]\d*)", text)
    return (int(match[1].replace("_", "")), int(match[2])) if match else None


def plan_run(request: Request, shape: Shape, machine: Machine, split: FitSplit | TraceSplit | None = None) -> Plan:
    """Plan a fit and a trace.

    Args:
        split: of a fit or a trace that has divided its work already, and is planned alone.

    Raises:
        ConfigError: they cannot be kept within the memory; the sentence says what would do.
    """
    if not shape.layers:
        raise ConfigError("nothing to plan: got no tracked layer; choose some with --layers")
    if request.rank is not None:  # no layer can have a higher one
        request = replace(request, rank=min(request.rank, max(min(x.O, x.I) for x in shape.layers)))
    spread, limit, fit, trace = _divided(split) if split else _divide(request, shape, machine)
    copies = machine.devices // spread
    disk, passes = _disk(request, shape, copies, fit), _passes(request, shape, machine, fit, trace, copies)
    if fit and (size := Passes(request, shape, machine, request.dtype, copies).keeping(fit).size):
        disk |= {"kept between passes": size}
    advice = []
    if "bfloat16" in machine.rates and not request.narrow:
        rough = replace(request, dtype="bfloat16", scan_dtype="bfloat16")
        faster = _total(passes) / _total(_passes(rough, shape, machine, fit, trace, copies))
        advice = [f"bfloat16 pays here: about {faster:.1f} times as fast (--dtype bfloat16)"] if faster >= PAYS else []
    if spread > 1:
        advice += [f"one copy of the model needs {spread} devices; copies side by side: {copies}"]
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


def _passes(
    request: Request, shape: Shape, machine: Machine, fit: FitSplit | None, trace: TraceSplit | None, copies: int
) -> list[Pass]:
    fitting, tracing = (Passes(request, shape, machine, dtype, copies) for dtype in (request.dtype, request.scan))
    return (fitting.fit(fit) if fit else []) + (tracing.trace(trace) if trace else [])


def _total(passes: list[Pass]) -> float:
    return sum(p.seconds for p in passes)


def smallest_batch(request: Request, shape: Shape, machine: Machine) -> int:
    """Tokens of the smaller of the batches that fit and trace are divided into; nothing of it depends on the machine's rates.

    Raises:
        ConfigError: they cannot be kept within the memory; the sentence says what would do.
    """
    return min(split.batch_tokens for split in _divide(request, shape, machine)[2:] if split)


def _divided(split: FitSplit | TraceSplit) -> tuple[int, int, FitSplit | None, TraceSplit | None]:
    limit = split.made_for.limit
    return (1, limit, split, None) if isinstance(split, FitSplit) else (1, limit, None, split)


def _divide(r: Request, shape: Shape, machine: Machine) -> tuple[int, int, FitSplit | None, TraceSplit | None]:
    """Splits for the fewest devices to a copy of the model with which they keep the limit."""
    here = machine.resident is not None
    one = r.memory or (machine.memory if here else int(DEFAULT_SHARE * machine.memory))
    failed: ConfigError | None = None
    most = 1 if here else machine.devices
    for spread in (n for n in range(1, most + 1) if machine.devices % n == 0):
        try:
            limit = spread * one
            fit = split_fit(shape, _budget(r, shape, machine, limit, r.dtype)) if r.fit else None
            asked = Asked(r.queries, r.query_tokens, r.rank, r.layer_scores)
            trace = split_trace(shape, asked, _budget(r, shape, machine, limit, r.scan)) if r.queries else None
            return spread, limit, fit, trace
        except ConfigError as error:
            failed = error
    assert failed is not None
    raise failed


def _budget(r: Request, shape: Shape, machine: Machine, limit: int, dtype: str) -> Budget:
    """The model is there as it was loaded, for queries and the second look; another compute type is a copy beside it."""
    resident = LIBRARIES + SUM * shape.parameters if machine.resident is None else machine.resident
    copy = ITEM[dtype] * shape.parameters if weights_in(dtype) != machine.loaded else 0
    resident += 0 if machine.accelerator else SEQUENCE_BYTES * r.sequences
    longest, accelerator = r.longest_tokens, machine.accelerator
    return Budget(limit, resident, r.batch_tokens, longest, dtype, machine.cores, r.batch_sequences, copy, accelerator)


def _disk(r: Request, shape: Shape, copies: int, fit: FitSplit | None) -> dict[str, int]:
    """Bytes of what stays, and of the most that is there on the way."""
    layers, sizes = shape.layers, {}
    if fit:
        sizes["factors"] = covariance_size(layers) + _lam(layers)
        sizes["while fitting"] = _while_fitting(r, layers, copies, fit)
    if r.queries:
        sizes["solved queries"] = SUM * r.queries * factors_of(layers, Asked(r.queries, r.query_tokens, r.rank))
        table, by_layer = SUM * r.queries * r.sequences, len(layers) if r.layer_scores else 0
        sizes["scores"] = (2 + by_layer) * table
        sizes["while tracing"] = (4 + 2 * by_layer) * table  # the units of the scan are there besides, and put in order
    return sizes


def _lam(layers: Sequence[LayerSize]) -> int:
    return SUM * sum(x.O * x.I for x in layers)


def _while_fitting(r: Request, layers: Sequence[LayerSize], copies: int, fit: FitSplit) -> int:
    """The most that is on the disk during a fit: the old sums are there until the new ones are, the bases beside them.

    Where several processes share the work, units wait until those before them are there: about two of each process.
    """
    units = 0 if copies == 1 else min(2 * copies, math.ceil(min(r.fit_tokens, r.sequences * r.tokens) / UNIT_TOKENS))
    bases, most = 0, 0
    for group in fit.covariance:
        sums = covariance_size([layers[i] for i in group])
        most = max(most, bases + (2 + units) * sums)
        bases += 2 * sums if r.rounds else sums  # a next round adds to the sums
    done = 0
    for group in fit.correction:
        sums = 2 * _lam([layers[i] for i in group])
        most = max(most, bases + done + (2 + units) * sums)
        done += sums
    return max(most, bases + done + _lam(layers))


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
    limit = show_bytes(plan.limit / plan.spread)
    device = f"each of {plan.devices} devices" if plan.devices > 1 else "memory"
    lines.append(
        f"plan: {plan.machine}, {device} limited to {limit}, {show_seconds(plan.start)} to start" + _batches(plan)
    )
    return lines + plan.advice


def _batches(plan: Plan) -> str:
    tokens = dict.fromkeys(split.batch_tokens for split in (plan.fit, plan.trace) if split)
    return f", batches of {' and '.join(f'{t:,}' for t in tokens)} tokens"
