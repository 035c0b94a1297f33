"""How a fit and a trace divide their work so that they stay within a memory limit: pure arithmetic, decided before they start.

All sizes are bytes.  ``fixed`` is what is there before a pass begins: the libraries, the model, the corpus.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from upriver.errors import ConfigError
from upriver.kernels import SIDES
from upriver.runtime.cost import (
    CACHES,
    COMPARED,
    CORRECTION,
    COVARIANCE,
    DENSE_BYTES,
    HANDED,
    ITEM,
    SUM,
    Asked,
    Chunks,
    Contraction,
    Layers,
    Shape,
    Spec,
    chunks,
    contraction,
    diagonal,
    groups,
    largest,
    leads,
    norms_size,
    query_size,
    solved_size,
    square,
)
from upriver.runtime.progress import show_bytes

WIDE = 8  # float64, in eigendecompositions
HEAD_COPIES = 2  # logits, which become their gradient, and what is made of a few of them, or by a tail of half as many
EIGEN_COPIES = 6  # n x n in float64: matrix, its copy, eigenvectors, workspace of two, what the layer's other side left
TRANSIENT = 4  # tensors of the widest layer alive at once in the backward pass
SEQUENCE_BYTES = 128  # of a sequence: its places in the tables of the corpus and among the batches
SLACK = 160 << 20  # what the allocator, the BLAS libraries and their threads keep to themselves
MARGIN = 0.05  # of the limit, left free: a promise is kept, an estimate is met on average
SCORES_BYTES = 32 << 20  # of a unit of a scan, within what is counted as slack:
LAYER_SCORES_BYTES = 128 << 20  # where scores are kept by layer, which is counted
Pass = tuple[
    Callable[[Layers], float], Callable[[int], int]
]  # what it holds of layers, and takes beside in a batch of tokens
JUDGED = 4  # sets of gradients that judging solutions takes: questions and their solutions, and both laid flat
JUDGED_TOKENS = 1024  # of a batch, in which forward mode is fastest
ALONG_BYTES = 256 << 20  # for what goes through such a batch along some of the vectors
QUERY_BYTES = 1 << 30  # gradients and solutions of queries held at once; more where the limit is four times as large


class Budget(NamedTuple):
    """What memory depends on, besides the model."""

    limit: int
    fixed: int
    batch_tokens: int  # asked for; a division may take fewer
    longest: int  # tokens of the longest sequence
    dtype: str = "float32"
    cores: int = 1
    sequences: int = 0  # most sequences of a batch; 0: all are as long as the longest
    copy: int = 0  # more bytes that the weights take in the type of a fit or a scan
    exact: str = "float32"  # type of queries and of the second look
    widened: int = 0  # more bytes that the weights take in that
    accelerator: bool = False  # the memory is that of a GPU

    @property
    def doubled(self) -> int:
        """In float64 all sums take twice what is counted."""
        return 2 if self.dtype == "float64" else 1

    @property
    def chunks(self) -> Chunks:
        return chunks(self.accelerator)

    @property
    def free(self) -> int:
        """What a pass may take."""
        return (int((1 - MARGIN) * self.limit) - self.fixed - SLACK) // self.doubled

    def peaks(self, sizes: dict[str, float]) -> dict[str, int]:
        """The peak of each pass, from what it takes itself."""
        return {name: int(self.fixed + SLACK + self.doubled * size) for name, size in sizes.items()}

    def check(self, what: str, least: float) -> None:
        """Refuse a limit that not even the smallest division of the work keeps.

        Raises:
            ConfigError: the sentence says what would do.
        """
        if least > self.free:
            needed = (self.fixed + SLACK + self.doubled * least) / (1 - MARGIN)
            raise ConfigError(
                f"the memory is too small for this {what}: got {show_bytes(self.limit)}; the least that would do is "
                f"{show_bytes(needed * 1.005)}, of which {show_bytes(self.fixed)} are there before it starts: "
                "give more with --memory, track fewer layers with --layers, or cut shorter sequences with --seq-len"
            )

    def together(self, tokens: int) -> int:
        """The most sequences of a batch of so many tokens."""
        return max(1, -(-(self.sequences or self.batch_tokens // self.longest) * tokens // self.batch_tokens))

    @property
    def halvings(self) -> list[int]:
        """Tokens of a batch: as asked for, then less and less, down to one sequence."""
        sizes = [max(self.batch_tokens, self.longest)]
        while sizes[-1] // 2 > self.longest:
            sizes.append(sizes[-1] // 2)
        return sizes if sizes[-1] == self.longest else [*sizes, self.longest]


class Division(NamedTuple):
    """How a run's work is divided: tokens of a batch, and for each pass the layers that go through it together."""

    batch_tokens: int
    groups: dict[str, list[list[int]]]  # layers by index, a list for each time over the data
    peak: dict[str, int]  # by pass
    limit: int
    eigen_workers: int = 1
    solve_bytes: int = 0  # gradients (as tokens) and solutions of queries at once
    rescore_bytes: int = 0  # the same at full rank
    judged: int = 0  # questions whose solutions are judged at once; 0: there is no room to judge any
    scan_room: int = 0  # queries as they are laid out, and batches that wait for them
    exact: str = "float32"  # the type in which queries are solved and the top is looked at again

    def room(self, name: str) -> int:
        """Bytes that a pass leaves under the limit."""
        return max(0, int((1 - MARGIN) * self.limit) - self.peak[name])


def batch_size(shape: Shape, tokens: int, dtype: str, work: float = 0, at_once: Chunks = CACHES) -> int:
    """Activations of a batch, and the larger of what comes after them: the head's chunks of logits, or the backward pass.

    Args:
        work: what a layer's consumer takes in the backward pass.
    """
    logits = min(at_once.logits, SUM * shape.vocabulary * min(at_once.logit_rows, tokens))
    numbers = shape.narrow if dtype == "bfloat16" and shape.narrow else shape.activation
    backward = ITEM[dtype] * TRANSIENT * shape.widest * tokens + work
    return int(ITEM[dtype] * numbers * tokens + max(HEAD_COPIES * logits, backward))


def eigen_size(layers: Layers, workers: int, item: int = WIDE) -> int:
    """The largest matrices, a worker each; of those in diagonal blocks the largest block, and the eigenvectors of the others."""
    sizes = []
    for x in layers:
        blocks = [diagonal(n, x.parts) for n in ([x.O, x.I] if leads(x) else [x.O] if not x.pool else [])]
        others = SUM * sum(sum(k * k for k in b) - max(b) ** 2 for b in blocks)
        sizes += [EIGEN_COPIES * item * max(b) ** 2 + others for b in blocks]
    return sum(sorted(sizes, reverse=True)[:workers])


def divide_fit(shape: Shape, budget: Budget) -> Division:
    """The fewest passes that keep the limit, then the largest batch.

    Raises:
        ConfigError: not even one layer and one sequence at a time fit; the sentence says what would do.
    """
    layers = shape.layers
    budget = budget._replace(fixed=budget.fixed + budget.copy)

    def compared(tokens: int) -> int:
        """A batch of which a few sequences are scored on each other."""
        tokens = max(tokens, 2 * budget.longest)
        sequences = min(COMPARED, max(2, budget.together(tokens)))
        return batch_size(shape, tokens, budget.dtype, 3 * sequences * SUM * largest(layers), budget.chunks)

    passes = {spec.name: _pass(shape, spec, budget) for spec in (COVARIANCE, CORRECTION)}
    passes["agreement"] = CORRECTION.held, compared
    item = SUM if budget.dtype == "bfloat16" else WIDE  # decompositions are in float32 then
    tokens, found, sizes = _fewest(layers, passes, budget, "fit", eigen_size(layers, 1, item))
    workers = max(k for k in range(1, budget.cores + 1) if k == 1 or eigen_size(layers, k, item) <= budget.free)
    sizes["eigendecomposition"] = eigen_size(layers, workers, item)
    return Division(tokens, found, budget.peaks(sizes), budget.limit, workers)


def divide_pass(shape: Shape, spec: Spec, budget: Budget) -> Division:
    """One pass by itself, likewise."""
    budget = budget._replace(fixed=budget.fixed + budget.copy)
    tokens, found, sizes = _fewest(shape.layers, {spec.name: _pass(shape, spec, budget)}, budget, f"pass ({spec.name})")
    return Division(tokens, found, budget.peaks(sizes), budget.limit)


def _pass(shape: Shape, spec: Spec, budget: Budget) -> Pass:
    def beside(tokens: int) -> int:
        work = spec.work(shape.layers, tokens, budget.chunks)
        return batch_size(shape, tokens, budget.dtype, work, budget.chunks)

    return spec.held, beside


def _fewest(
    layers: Layers, passes: dict[str, Pass], budget: Budget, what: str, least_beside: float = 0.0
) -> tuple[int, dict[str, list[list[int]]], dict[str, float]]:
    """The tokens of a batch with which the layers go through the passes in the fewest groups, these, and what each takes."""

    def least(tokens: int) -> float:
        return max(max(held([x]) for x in layers) + beside(tokens) for held, beside in passes.values())

    budget.check(what, max(least(budget.longest), least_beside))
    ways = [
        (tokens, {name: groups(layers, held, budget.free - beside(tokens)) for name, (held, beside) in passes.items()})
        for tokens in budget.halvings
        if least(tokens) <= budget.free
    ]
    tokens, found = min(ways, key=lambda way: sum(map(len, way[1].values())))
    sizes = {
        name: max(held([layers[i] for i in group]) for group in found[name]) + beside(tokens)
        for name, (held, beside) in passes.items()
    }
    return tokens, found, sizes


def scan_held(layers: Layers, asked: Asked, budget: Budget, tokens: int, room: float) -> Contraction:
    """How some layers are contracted with the queries, in a batch of so many tokens at most."""
    number, norms = HANDED[budget.dtype], norms_size(layers, asked)
    found = contraction(layers, tokens, budget.together(tokens), asked, room - norms, number, budget.accelerator)
    return found._replace(held=found.held + norms)


class Sizes(NamedTuple):
    """What the passes of a trace take, for some layers, queries at once, and tokens of a batch."""

    shape: Shape
    asked: Asked
    budget: Budget

    def gradients(self, some: Layers, number: int, tokens: int) -> float:
        """Of the largest layer, that meet the queries at once."""
        one = number * largest(some)
        return max(one, min(self.budget.chunks.scored, self.budget.together(tokens) * one))

    def solve(self, some: Layers, asked: Asked, at_once: int, tokens: int) -> float:
        """Some queries in some layers, and either their batch or, layer by layer, its curvature and their gradients in it."""
        # bases and eigenvalues of the largest layer
        block = SUM * max(square(x.O, x.parts) + square(x.I, x.parts) + x.O * x.I for x in some)
        batch, dense = max(asked.tokens, min(tokens, at_once * asked.tokens)), SUM * largest(some)
        layer = block + at_once * 3 * dense if asked.rank is None else SIDES * (block + 2 * dense)
        passing = max(batch_size(self.shape, batch, self.budget.exact, 0, self.budget.chunks), layer)
        return self.budget.widened + passing + at_once * query_size(some, asked)

    def answer(self, some: Layers, at_once: int, tokens: int) -> float:
        """Queries solved in some layers; what is solved of them in the others is in the memory too, or in the host's."""
        solved = solved_size(self.shape.layers, self.asked) - solved_size(some, self.asked)
        others = 0 if self.budget.accelerator else at_once * solved
        return self.solve(some, self.asked, at_once, tokens) + others

    def rescore(self, some: Layers, at_once: int, tokens: int) -> float:
        """Some queries at full rank, and then a batch of sequences with their gradients in a layer."""
        full = self.asked._replace(rank=None)
        work = max(self.gradients(some, SUM, tokens), SUM * tokens * self.shape.widest)
        batch = self.budget.widened + batch_size(self.shape, tokens, self.budget.exact, work, self.budget.chunks)
        return max(self.solve(some, full, at_once, tokens), batch + at_once * query_size(some, full))

    def judge(self, at_once: int, tokens: int) -> float:
        """Some queries and their solutions at full rank, and what goes through a batch of outputs along a few of them."""
        shape, tokens = self.shape, min(tokens, JUDGED_TOKENS)
        flat, outputs = SUM * sum(x.O * x.I for x in shape.layers), SUM * shape.vocabulary * tokens
        kept = ITEM[self.budget.exact] * shape.activation * tokens
        # half as much again is what the allocator keeps between batches
        along = max(ALONG_BYTES, 4 * flat + 6 * outputs + kept) * 3 // 2
        return self.budget.widened + (JUDGED * at_once + 1) * flat + along + 2 * outputs + kept

    def batch(self, tokens: int) -> float:
        """The model in its compute type, and one batch with the gradients of its sequences: all of a scan but what is held."""
        asked, budget, layers = self.asked, self.budget, self.shape.layers
        by_token = 2 * HANDED[budget.dtype] * asked.queries * (asked.rank or 0)
        products = max(budget.longest * by_token, min(budget.chunks.scored, tokens * by_token))
        kept = SUM * asked.queries * len(layers) * budget.together(tokens) if asked.layer_scores else 0
        kept = kept and 2 * max(LAYER_SCORES_BYTES, kept)
        work = max(self.gradients(layers, HANDED[budget.dtype], tokens), products)
        work = max(work, CORRECTION.work(layers, tokens, budget.chunks) if asked.norms else 0)
        made = batch_size(self.shape, tokens, budget.dtype, work, budget.chunks)
        return budget.copy + budget.chunks.rebuilt + kept + made

    def held(self, some: Layers, room: float, tokens: int) -> float:
        return scan_held(some, self.asked, self.budget, tokens, room).held

    def least(self, tokens: int) -> float:
        """With one layer and one query at a time; experts are thousands, and alike."""
        layers = {(x.O, x.I, x.parts, x.rows, x.pool in ("", x.name)): [x] for x in self.shape.layers}.values()
        scan = self.batch(tokens) + max(self.held(x, 0, tokens) for x in layers)
        return max(scan, *(max(self.answer(x, 1, tokens), self.rescore(x, 1, tokens)) for x in layers))

    def passes(self, tokens: int) -> dict[str, list[list[int]]]:
        """The layers that go together in each pass."""
        layers, free = self.shape.layers, self.budget.free
        room = free - self.batch(tokens)
        return {
            "scan": groups(layers, lambda some: self.held(some, room, tokens), room),
            "rescore": groups(layers, lambda some: self.rescore(some, 1, tokens), free),
            "queries": groups(layers, lambda some: self.answer(some, 1, tokens), free),
        }


def divide_trace(shape: Shape, asked: Asked, budget: Budget) -> Division:
    """As few passes over the corpus as fit, in the largest batch for which they do; then as many queries at once as fit.

    Queries are solved, and the top is looked at again, for as many layers together as fit with one query.

    Raises:
        ConfigError: not even one query, one layer and one sequence at a time fit; the sentence says what would do.
    """
    sizes, layers, free = Sizes(shape, asked, budget), shape.layers, budget.free
    budget.check("trace", sizes.least(budget.longest))
    ways = [(tokens, sizes.passes(tokens)) for tokens in budget.halvings if sizes.least(tokens) <= free]
    tokens, found = min(ways, key=lambda way: list(map(len, way[1].values())))
    together = {name: [[layers[i] for i in group] for group in some] for name, some in found.items()}
    most, full = max(QUERY_BYTES, budget.limit // 4), asked._replace(rank=None)
    each = query_size(layers, asked), max(query_size(some, full) for some in together["rescore"])
    # but on accelerators, reading the factors again takes little of the time of multiplying a batch of tokens with them
    enough = asked.queries if budget.accelerator else min(asked.queries, -(-tokens // asked.tokens))
    counts = {"queries": min(enough, most // each[0]), "rescore": min(asked.queries, most // each[1])}
    room, size = free - sizes.batch(tokens), {"queries": sizes.answer, "rescore": sizes.rescore}
    peak = {"scan": max(sizes.batch(tokens) + sizes.held(some, room, tokens) for some in together["scan"])}
    for name, at_most in counts.items():
        of_all = partial(_largest, together[name], size[name], tokens)
        counts[name] = _most(at_most, free, of_all)
        peak[name] = of_all(counts[name])
    held = int(min(room, 4 * DENSE_BYTES + each[0] * asked.queries + norms_size(layers, asked)))
    at_once, judged = (counts["queries"] * each[0], counts["rescore"] * each[1]), 0
    if sizes.judge(1, tokens) <= free:
        at_most = min(asked.queries, most // (JUDGED * SUM * sum(x.O * x.I for x in layers)))
        judged = _most(at_most, free, lambda number: sizes.judge(number, tokens))
        peak["judge"] = sizes.judge(judged, tokens)
    return Division(tokens, found, budget.peaks(peak), budget.limit, 1, *at_once, judged, held, budget.exact)


def _largest(together: Sequence[Layers], size: Callable[[Layers, int, int], float], tokens: int, queries: int) -> float:
    return max(size(some, queries, tokens) for some in together)


def _most(at_most: int, room: float, size: Callable[[int], float]) -> int:
    """The most queries at once, at least one, whose size stays in the room."""
    low, high = 1, max(1, at_most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle - 1)
    return low


def still_fits(found: Division, made: Division) -> bool:
    """Whether work that was divided by an earlier run keeps the limit of one that would be divided as ``made`` now.

    What a process has more at its start than the one before it divides nothing anew: half of the margin is for that.
    """
    return found.limit == made.limit or max(found.peak.values()) <= (1 - MARGIN / 2) * made.limit
