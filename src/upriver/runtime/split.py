"""How a fit and a trace divide their work so that they stay within a memory limit: pure arithmetic, decided before they start.

All sizes are bytes.  ``fixed`` is what is there before a pass begins: the libraries, the model, the corpus.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from upriver.errors import ConfigError
from upriver.runtime.config import MIXED
from upriver.runtime.counts import DENSE_BYTES, Shape, Sized, contraction, leads
from upriver.runtime.progress import show_bytes

SUM = 4  # bytes of a number in a sum, a basis or a full-rank query, whatever the compute type
WIDE = 8  # float64, in eigendecompositions
SIDES = 2  # layers whose queries are solved side by side
ITEM = {"float32": 4, "bfloat16": 2, "float64": 8, MIXED: 4}
HANDED = ITEM | {MIXED: 2}  # of a number of what layers saw, and of queries that meet it
HEAD_BYTES, HEAD_ROWS = 128 << 20, 1024  # float32 logits held at once; more rows make no product faster
HEAD_COPIES = 2  # logits, which become their gradient, and what is made of a few of them, or by a tail of half as many
EIGEN_COPIES = 6  # n x n in float64: matrix, its copy, eigenvectors, workspace of two, what the layer's other side left
GRADIENT_BYTES = 4 << 20  # gradients of single sequences held at once: what stays in the caches of a core
GRADIENT_COPIES = 3
COMPARED_BYTES = 256 << 20  # gradients of the sequences that are scored on each other, in one layer
COMPARED = (8, 4)  # of them at once; two where four do not fit
SCORED_BYTES = 256 << 20  # gradients of sequences, or products of their tokens, that meet the queries at once
TRANSIENT = 4  # tensors of the widest layer alive at once in the backward pass
SEQUENCE_BYTES = 128  # of a sequence: its places in the tables of the corpus and among the batches
SLACK = 160 << 20  # what the allocator, the BLAS libraries and their threads keep to themselves
MARGIN = 0.05  # of the limit, left free: a promise is kept, an estimate is met on average
SYMMETRIC_COPIES = 3  # of the largest matrix, while a triangle is made whole and added to the sums on disk
SCORES_BYTES = 32 << 20  # of a unit of work, within what is counted as slack:
LAYER_SCORES_BYTES = 128 << 20  # where scores are kept by layer, which is counted
QUERY_BYTES = 1 << 30  # gradients and solutions of queries held at once; more where the limit is four times as large
REBUILD_BYTES = 64 << 20  # rows of multiplied-out queries held at once in one layer, with those of gradients


class Budget(NamedTuple):
    """What memory depends on, besides the model."""

    limit: int
    fixed: int
    batch_tokens: int  # asked for; a split may take fewer
    longest: int  # tokens of the longest sequence
    dtype: str = "float32"
    cores: int = 1
    sequences: int = 0  # most sequences of a batch; 0: all are as long as the longest
    copy: int = 0  # of the weights, in the compute type of a fit or a scan; queries and the second look do without
    accelerator: bool = False  # the memory is that of a GPU


class FitSplit(NamedTuple):
    """Layers by index, a list for each pass over the sample."""

    batch_tokens: int
    covariance: list[list[int]]
    correction: list[list[int]]
    eigen_workers: int
    compared: int  # sequences scored on each other at once
    peak: dict[str, int]  # by pass
    made_for: Budget


class TraceSplit(NamedTuple):
    batch_tokens: int
    solve_queries: int  # solved at once
    solve_bytes: int  # their gradients (as tokens) and solutions
    scan_queries: int  # scored in one pass over the corpus
    rescore_queries: int  # held at full rank at once
    rescore_bytes: int
    dense_bytes: int  # queries that are multiplied out once, or batches that wait for them
    token_bytes: int  # compressed queries of the layers that go by tokens, at most
    peak: dict[str, int]
    made_for: Budget


class Asked(NamedTuple):
    """The queries of a trace."""

    queries: int
    tokens: int  # of one query
    rank: int | None  # None: full
    layer_scores: bool = False


def groups(layers: Sequence[Sized], size: Callable[[Sequence[Sized]], int], room: int) -> list[list[int]]:
    """The fewest runs of consecutive layers of which each is at most ``room``.

    Filled from the lowest layer up: the first group goes through the whole model anyway, and the others end as high as they can.
    A layer larger than the room is a group of its own.
    """
    found: list[list[int]] = []
    for i in range(len(layers)):
        if found and size([layers[j] for j in found[-1]] + [layers[i]]) <= room:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def covariance_size(layers: Sequence[Sized]) -> int:
    """The sums of a group: ``S`` of each layer, ``A`` of each input once."""
    return SUM * sum(x.O**2 + (x.I**2 if leads(x) else 0) for x in layers)


def correction_size(layers: Sequence[Sized]) -> int:
    """Bases of a group (that of a shared input once) and the sums of ``lam`` in two halves."""
    inputs = {x.A_of: x.I**2 for x in layers}
    return SUM * (sum(inputs.values()) + sum(x.O**2 + 2 * x.O * x.I for x in layers))


def batch_size(shape: Shape, tokens: int, dtype: str, work: int = 0) -> int:
    """Activations of a batch, and the larger of what comes after them: the head's chunks of logits, or the backward pass.

    Args:
        work: what a layer's consumer takes in the backward pass.
    """
    logits = min(HEAD_BYTES, SUM * shape.vocabulary * min(HEAD_ROWS, tokens))
    numbers = shape.narrow if dtype == "bfloat16" and shape.narrow else shape.activation
    held, backward = numbers * tokens, TRANSIENT * shape.widest * tokens
    return int(ITEM[dtype] * held) + max(HEAD_COPIES * logits, int(ITEM[dtype] * backward) + work)


def _sides(layers: Sequence[Sized]) -> list[int]:
    """Sides of all matrices that are decomposed, largest first."""
    return sorted([x.O for x in layers] + [x.I for x in layers if leads(x)], reverse=True)


def covariance_work(layers: Sequence[Sized], tokens: int) -> int:
    """Beside the sums: what a layer saw, turned round; or one matrix on its way to disk, and what it is added to there."""
    side = _sides(layers)[0]
    return SUM * max(tokens * side, SYMMETRIC_COPIES * side**2)


def correction_work(layers: Sequence[Sized], tokens: int) -> int:
    """Beside bases and sums: what a layer saw, rotated, and a few gradients."""
    rotated = 2 * SUM * tokens * _sides(layers)[0]
    return rotated + GRADIENT_COPIES * max(GRADIENT_BYTES, SUM * max(x.O * x.I for x in layers))


def agreement_size(shape: Shape, budget: Budget, compared: int, tokens: int) -> int:
    """A batch, of the fit or of a few sequences that are scored on each other, and their gradients in one layer."""
    gradients = GRADIENT_COPIES * compared * SUM * max(x.O * x.I for x in shape.layers)
    return batch_size(shape, max(tokens, compared * budget.longest), budget.dtype, gradients)


def eigen_size(layers: Sequence[Sized], workers: int) -> int:
    return EIGEN_COPIES * WIDE * sum(n * n for n in _sides(layers)[:workers])


def _halvings(batch_tokens: int, longest: int) -> list[int]:
    sizes = [max(batch_tokens, longest)]
    while sizes[-1] // 2 > longest:
        sizes.append(sizes[-1] // 2)
    return sizes if sizes[-1] == longest else [*sizes, longest]


def split_fit(shape: Shape, budget: Budget) -> FitSplit:
    """The fewest passes that keep the limit, then the largest batch.

    Raises:
        ConfigError: not even one layer and one sequence at a time fit; the sentence says what would do.
    """
    made_for, budget = budget, budget._replace(fixed=budget.fixed + budget.copy, copy=0)
    layers, free = shape.layers, _free(budget)
    work = {"covariance": covariance_work, "correction": correction_work}
    sizes = {"covariance": covariance_size, "correction": correction_size}
    largest = SUM * max(x.O * x.I for x in layers)
    few = [k for k in COMPARED if k == COMPARED[-1] or k * largest <= COMPARED_BYTES]

    def batch(name: str, tokens: int, compared: int) -> int:
        size = batch_size(shape, tokens, budget.dtype, work[name](layers, tokens))
        return size if name == "covariance" else max(size, agreement_size(shape, budget, compared, tokens))

    least = max(max(size([x]) for x in layers) + batch(name, budget.longest, 2) for name, size in sizes.items())
    _refuse("fit", budget, max(least, eigen_size(layers, 1)))

    def divide(tokens: int, compared: int) -> dict[str, list[list[int]]] | None:
        room = {name: free - batch(name, tokens, compared) for name in sizes}
        found = {name: groups(layers, size, room[name]) for name, size in sizes.items()}
        fits = all(sizes[n]([layers[i] for i in g]) <= room[n] for n, all_g in found.items() for g in all_g)
        return found if fits else None

    ways = [(tokens, k) for tokens in _halvings(budget.batch_tokens, budget.longest) for k in few]
    tried = [(*way, found) for way in ways if (found := divide(*way))]
    if not tried:
        tried = [(t, 2, found) for t in _halvings(budget.batch_tokens, budget.longest) if (found := divide(t, 2))]
    tokens, compared, found = min(tried, key=lambda x: sum(map(len, x[2].values())))
    workers = max(k for k in range(1, budget.cores + 1) if k == 1 or eigen_size(layers, k) <= free)
    base = budget.fixed + SLACK
    held = {n: base + max(sizes[n]([layers[i] for i in g]) for g in found[n]) for n in sizes}
    peak = {n: held[n] + batch_size(shape, tokens, budget.dtype, work[n](layers, tokens)) for n in sizes}
    peak["eigendecomposition"] = base + eigen_size(layers, workers)
    peak["agreement"] = held["correction"] + agreement_size(shape, budget, compared, tokens)
    return FitSplit(tokens, found["covariance"], found["correction"], workers, compared, peak, made_for)


class Keeping(NamedTuple):
    """Whether what the covariance and the correction pass see of the tracked layers is asked for again, and then kept on disk."""

    covariance: bool
    correction: bool
    one: bool  # both see the same: what the first has kept the second reads
    size: int  # bytes on disk, 0 where nothing is kept


def keeping(shape: Shape, split: FitSplit, tokens: float, dtype: str, one: bool, rounds: bool, space: int) -> Keeping:
    """What is kept, if at most half of the free ``space`` holds it: else nothing.

    Args:
        one: the labels of both passes are the same, those of the corpus.
        rounds: the correction pass comes again, over more and more of the sample (``until``).
    """
    first, second = len(split.covariance), len(split.correction) * (1 + rounds)
    again = (first + second > 1, first + second > 1) if one else (first > 1, second > 1)
    each = int(tokens * HANDED[dtype] * sum(x.O + (x.I if leads(x) else 0) for x in shape.layers))
    size = each * (1 if one else sum(again))
    return Keeping(*again, one, size) if size and size <= space // 2 else Keeping(False, False, one, 0)


def factors_of(layers: Sequence[Sized], asked: Asked) -> int:
    """Numbers of one solved query over all layers, compressed (or whole)."""
    R = asked.rank
    return sum(x.O * x.I if R is None else (x.O + x.I) * min(R, x.O, x.I) for x in layers)


def _block(layers: Sequence[Sized]) -> int:
    """Bases and eigenvalues of the largest layer."""
    return SUM * max(x.O**2 + x.I**2 + x.O * x.I for x in layers)


def query_size(layers: Sequence[Sized], asked: Asked) -> int:
    """One query between its backward pass and the end of its solution: its tokens' factors, and what is solved of it."""
    return SUM * (sum((x.O + x.I) * min(asked.tokens, x.O, x.I) for x in layers) + factors_of(layers, asked))


def solve_size(shape: Shape, asked: Asked, at_once: int, batch_tokens: int) -> int:
    """Some queries, and either their batch or, layer by layer, its curvature and their gradients in it."""
    tokens = max(asked.tokens, min(batch_tokens, at_once * asked.tokens))
    dense = SUM * max(x.O * x.I for x in shape.layers)
    whole = asked.rank is None  # compressed queries are whole one at a time, in two layers side by side
    layer = _block(shape.layers) + at_once * 3 * dense if whole else SIDES * (_block(shape.layers) + 2 * dense)
    return max(batch_size(shape, tokens, "float32"), layer) + at_once * query_size(shape.layers, asked)


def rescore_size(shape: Shape, asked: Asked, budget: Budget, at_once: int, tokens: int) -> int:
    """Some queries at full rank, and then a batch of sequences with their gradients in a layer."""
    full = asked._replace(rank=None)
    gradients = _scored(shape, SUM, _at_once(budget, tokens))
    batch = batch_size(shape, tokens, "float32", max(gradients, SUM * tokens * shape.widest))
    return max(solve_size(shape, full, at_once, tokens), batch + at_once * query_size(shape.layers, full))


def _at_once(budget: Budget, tokens: int) -> int:
    """The most sequences of a batch of ``tokens``."""
    return max(1, -(-(budget.sequences or budget.batch_tokens // budget.longest) * tokens // budget.batch_tokens))


def held_size(shape: Shape, asked: Asked, budget: Budget, tokens: int, room: int, most: int) -> int:
    """Queries as they are laid out, and batches that wait; see :func:`contraction`."""
    N, number = _at_once(budget, tokens), HANDED[budget.dtype]
    return int(
        contraction(shape.layers, tokens, N, asked.queries, asked.rank, room, number, budget.accelerator, most).held
    )


def scan_size(shape: Shape, asked: Asked, budget: Budget, tokens: int) -> int:
    """The model in its compute type, and one batch with the gradients of its sequences: all but what is held."""
    gradients = _scored(shape, HANDED[budget.dtype], _at_once(budget, tokens))
    by_token = 2 * HANDED[budget.dtype] * asked.queries * (asked.rank or 0)
    products = max(budget.longest * by_token, min(SCORED_BYTES, tokens * by_token))
    kept = SUM * asked.queries * len(shape.layers) * _at_once(budget, tokens) if asked.layer_scores else 0
    kept = kept and 2 * max(LAYER_SCORES_BYTES, kept)
    return budget.copy + REBUILD_BYTES + kept + batch_size(shape, tokens, budget.dtype, max(gradients, products))


def _scored(shape: Shape, number: int, sequences: int) -> int:
    """Gradients of the largest layer that meet the queries at once."""
    largest = number * max(x.O * x.I for x in shape.layers)
    return max(largest, min(SCORED_BYTES, sequences * largest))


def split_trace(shape: Shape, asked: Asked, budget: Budget) -> TraceSplit:
    """As many queries at once as fit, in the largest batch for which all do.

    Raises:
        ConfigError: not even one query and one sequence at a time fit; the sentence says what would do.
    """
    layers, free = shape.layers, _free(budget)

    def read(queries: int) -> int:
        """Two copies of one layer's compressed queries, as they are read or as they are laid out."""
        return 2 * max(SUM, HANDED[budget.dtype]) * queries * (asked.rank or 0) * max(x.O + x.I for x in layers)

    def left(queries: int, tokens: int) -> int:
        """For compressed queries that stay."""
        return max(0, free - scan_size(shape, asked._replace(queries=queries), budget, tokens) - read(queries))

    def scan(queries: int, tokens: int, room: int = 0) -> int:
        some = asked._replace(queries=queries)
        held = held_size(shape, some, budget, tokens, room, left(queries, tokens) - room)
        return held + scan_size(shape, some, budget, tokens)

    def least(tokens: int) -> int:
        return max(scan(1, tokens), solve_size(shape, asked, 1, tokens), rescore_size(shape, asked, budget, 1, tokens))

    def together(tokens: int) -> int:
        return _most(asked.queries, free, lambda q: scan(q, tokens))

    _refuse("trace", budget, least(budget.longest))
    fitting = [b for b in _halvings(budget.batch_tokens, budget.longest) if least(b) <= free]
    tokens = max(fitting, key=together)  # the fewest passes over the corpus, then the largest batch
    passes = -(-asked.queries // together(tokens))
    scanned = -(-asked.queries // passes)
    most, full = max(QUERY_BYTES, budget.limit // 4), asked._replace(rank=None)
    each = (query_size(layers, asked), query_size(layers, full))
    # but on accelerators, reading the factors again takes little of the time of multiplying a batch of tokens with them
    enough = asked.queries if budget.accelerator else min(asked.queries, -(-tokens // asked.tokens))
    solved = _most(min(enough, most // each[0]), free, lambda q: solve_size(shape, asked, q, tokens))
    rescored = _most(min(asked.queries, most // each[1]), free, lambda q: rescore_size(shape, asked, budget, q, tokens))
    room = max(0, min(DENSE_BYTES, free - scan(scanned, tokens) - read(scanned)))
    base = budget.fixed + SLACK
    peak = {
        "queries": base + solve_size(shape, asked, solved, tokens),
        "scan": base + scan(scanned, tokens, room),
        "rescore": base + rescore_size(shape, asked, budget, rescored, tokens),
    }
    sizes = (solved * each[0], rescored * each[1])
    by_token = left(scanned, tokens) - room
    return TraceSplit(tokens, solved, sizes[0], scanned, rescored, sizes[1], room, by_token, peak, budget)


def _most(at_most: int, room: int, size: Callable[[int], int]) -> int:
    """The most queries at once, at least one, whose size stays in the room."""
    if size(at_most) <= room:  # though fewer may take more: what is cheaper for few of them may hold more
        return max(1, at_most)
    low, high = 1, max(1, at_most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle - 1)
    return low


def fits(split: FitSplit | TraceSplit, budget: Budget) -> bool:
    """Whether work that was divided for another limit, or beside other memory in use, stays within the limit of ``budget``.

    Half of the margin is for what a process has more at its start than the one before it: that alone divides nothing anew.
    """
    once = SLACK + (split.made_for.copy if isinstance(split, FitSplit) else 0)
    counted = max(split.peak.values()) - split.made_for.fixed - once
    return budget.fixed + once + _double(budget) * counted <= (1 - MARGIN / 2) * budget.limit


def _free(budget: Budget) -> int:
    """What a pass may take; half of it in float64, whose sums are counted as those of float32."""
    left = int((1 - MARGIN) * budget.limit) - budget.fixed - SLACK
    return left // _double(budget)


def _double(budget: Budget) -> int:
    return 2 if budget.dtype == "float64" else 1


def _refuse(what: str, budget: Budget, least: int) -> None:
    needed = (budget.fixed + SLACK + _double(budget) * least) / (1 - MARGIN)
    if least > _free(budget):
        raise ConfigError(
            f"the memory is too small for this {what}: got {show_bytes(budget.limit)}; the least that would do is "
            f"{show_bytes(needed * 1.005)}, of which {show_bytes(budget.fixed)} are there before it starts: "
            "give more with --memory, track fewer layers with --layers, or cut shorter sequences with --seq-len"
        )
