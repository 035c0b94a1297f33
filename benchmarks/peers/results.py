"""What a run found, and the tables that are printed of it."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

FIT = ("covariance", "eigendecomposition", "correction")
ALIKE = 0.9999  # Pearson correlation asked at full rank in float32


class Asked(NamedTuple):
    """One scoring: how many queries, at which rank (``None``: full)."""

    queries: int
    rank: int | None

    def __str__(self) -> str:
        return f"{self.queries} queries, " + ("full rank" if self.rank is None else f"rank {self.rank}")


class Results:
    """Seconds, peak bytes, scores and bytes of solved queries of every side."""

    def __init__(self, sides: list[str]):
        self.sides = sides
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.peak: dict[tuple[str, str], int] = {}
        self.scores_NQ: dict[tuple[Asked, str], np.ndarray] = {}
        self.stored: dict[tuple[Asked, str], int] = {}
        self.reference_NQ: dict[int, np.ndarray] = {}

    def step(self, reply: dict[str, Any]) -> None:
        self.seconds.setdefault(("step", "ours"), []).append(reply["seconds"]["step"])

    def fit(self, side: str, reply: dict[str, Any]) -> None:
        for phase in FIT:
            self._phase(phase, side, reply["seconds"][phase], reply["peak"][phase])
        if "other" in reply["seconds"]:
            self._phase("rest of the fit", side, reply["seconds"]["other"], reply["peak"]["other"])
        self._phase("**fit in all**", side, sum(reply["seconds"].values()), max(reply["peak"].values()))

    def score(self, asked: Asked, side: str, reply: dict[str, Any]) -> None:
        seconds, peak = reply["seconds"], reply["peak"]
        self._phase(f"{asked}: gradients, solve", side, seconds["solve"], peak["solve"])
        self._phase(f"{asked}: pass", side, seconds["scan"], peak["scan"])
        self._phase(f"**{asked}: in all**", side, sum(seconds.values()), max(peak.values()))
        self.scores_NQ[asked, side], self.stored[asked, side] = np.load(reply["scores"]), reply["stored"]

    def _phase(self, phase: str, side: str, seconds: float, peak: int) -> None:
        self.seconds.setdefault((phase, side), []).append(seconds)
        self.peak[phase, side] = max(self.peak.get((phase, side), 0), peak)

    @property
    def phases(self) -> list[str]:
        return [phase for phase in dict.fromkeys(phase for phase, _ in self.seconds) if phase != "step"]

    def median(self, phase: str, side: str) -> float | None:
        found = self.seconds.get((phase, side))
        return statistics.median(found) if found else None

    def ratio(self, phase: str, peer: str) -> float | None:
        """Median over the repeats of the peer's seconds over ours, each from the same repeat."""
        theirs, ours = (self.seconds.get((phase, side)) for side in (peer, "ours"))
        if not theirs or not ours:
            return None
        return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))

    def worst(self, peer: str) -> float | None:
        """The lowest Pearson correlation of a peer's scores with ours at full rank."""
        pairs = [(a, s) for a, s in self.scores_NQ if s == peer and a.rank is None and (a, "ours") in self.scores_NQ]
        return min((pearson(self.scores_NQ[pair], self.scores_NQ[pair[0], "ours"]) for pair in pairs), default=None)


def print_all(results: Results, idle: dict[str, int]) -> None:
    print_times(results)
    print_memory(results, idle)
    print_stored(results)
    print_scores(results)


def print_times(results: Results) -> None:
    step, peers = results.median("step", "ours") or float("nan"), results.sides[1:]
    print(f"\nA plain training step over the corpus: {step:.2f} s. Ratios: their seconds over ours.\n")
    steps = [f"{side}, steps" for side in results.sides]
    table(["phase", *(f"{side}, s" for side in results.sides), *(f"ratio, {peer}" for peer in peers), *steps])
    for phase in results.phases:
        seconds = [results.median(phase, side) for side in results.sides]
        ratios = [results.ratio(phase, peer) for peer in peers]
        row(phase, *(text(x) for x in (*seconds, *ratios, *(None if s is None else s / step for s in seconds))))


def print_memory(results: Results, idle: dict[str, int]) -> None:
    print("\nPeak resident memory, GB (the process before the first command: at rest; the highest over the repeats)\n")
    table(["phase", *results.sides])
    row("at rest", *(text(idle[side] / 1e9) for side in results.sides))
    for phase in results.phases:
        row(phase, *(text(gigabytes(results.peak.get((phase, side)))) for side in results.sides))


def print_stored(results: Results) -> None:
    print("\nBytes of the solved queries, MB\n")
    table(["queries", *results.sides, *(f"ours / {peer}" for peer in results.sides[1:])])
    for asked in dict.fromkeys(asked for asked, _ in results.stored):
        held = [results.stored.get((asked, side)) for side in results.sides]
        shares = [held[0] / x if held[0] and x else None for x in held[1:]]
        row(str(asked), *(text(x and x / 1e6) for x in held), *(text(x) for x in shares))


def print_scores(results: Results) -> None:
    print("\nAgreement of the scores (Pearson correlation over all pairs)\n")
    columns = ["scores", "with ours", "largest difference / range", "with its own full rank"]
    table(columns + (["with ours in float32, full rank"] if results.reference_NQ else []))
    for (asked, side), found_NQ in results.scores_NQ.items():
        ours_NQ = results.scores_NQ.get((asked, "ours"))
        full_NQ = results.scores_NQ.get((asked._replace(rank=None), side))
        cells = ["", "", "" if full_NQ is None or asked.rank is None else f"{pearson(found_NQ, full_NQ):.6f}"]
        if side != "ours" and ours_NQ is not None:
            gap = np.abs(found_NQ - ours_NQ).max() / np.ptp(found_NQ)
            cells[:2] = [f"{pearson(found_NQ, ours_NQ):.8f}", f"{gap:.1e}"]
        if results.reference_NQ:
            cells.append(f"{pearson(found_NQ, results.reference_NQ[asked.queries]):.6f}")
        row(f"{side}, {asked}", *cells)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9


def text(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def table(columns: Iterable[str]) -> None:
    columns = list(columns)
    row(*columns)
    print("|" + "---|" * len(columns))


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")
