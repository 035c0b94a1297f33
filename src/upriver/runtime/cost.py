"""What every pass holds, works with and multiplies: dividing it, planning it and running it read the same description.

All sizes are bytes, from the sides of a layer alone.  Axes: ``I`` inputs and ``O`` outputs of a layer, ``T`` tokens of a
sequence, ``M`` tokens of a batch in ``N`` sequences, ``Q`` queries, ``R`` rank.  One multiplication is two floating-point
operations (with its addition).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

from upriver.runtime.config import MIXED

Order = Literal["tokens", "dense", "rebuilt"]
SUM = 4  # bytes of a number in a sum, a basis or a full-rank query, whatever the compute type
ITEM = {"float32": 4, "bfloat16": 2, "float64": 8, MIXED: 4}
HANDED = ITEM | {MIXED: 2}  # of a number of what layers saw, and of queries that meet it

DENSE_BYTES = 1 << 30  # queries, or batches that wait for them, held through a scan; twice as much gains little
WAITING_BYTES, WAITING_SHARE = 768 << 20, 1.5  # of batches that wait, at most, or so many times the solved queries
ENOUGH = 3  # batches wait until multiplying out takes a third of forming their gradients
MOVED = 32  # multiplications in the time of a number to or from the memory
OVERSAMPLE, PRODUCTS = 16, 10  # of the randomised singular value decomposition: extra columns, products with the matrix
NARROW = 16  # the narrowest side of a diagonal block: with fewer numbers in a row no product is fast
COMPARED = 8  # sequences that are scored on each other at once, where the fit's convergence is read


class Chunks(NamedTuple):
    """Bytes that are worked on at once: what stays in the caches of a CPU, or what keeps a GPU busy."""

    gradients: int  # of single sequences
    scored: int  # gradients of sequences, or products of their tokens, that meet the queries
    rebuilt: int  # rows of multiplied-out queries of a layer, with those of gradients
    logits: int  # in float32
    logit_rows: int  # of them; more make no product faster


CACHES = Chunks(4 << 20, 256 << 20, 64 << 20, 128 << 20, 1024)
DEVICE = Chunks(256 << 20, 1 << 30, 512 << 20, 512 << 20, 4096)


def chunks(accelerator: bool) -> Chunks:
    return DEVICE if accelerator else CACHES


class Sized(Protocol):
    """A tracked layer, as far as counting goes; :class:`upriver.model.layers.Layer` is one."""

    @property
    def name(self) -> str: ...
    @property
    def O(self) -> int: ...  # noqa: E743
    @property
    def I(self) -> int: ...  # noqa: E743
    @property
    def A_of(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def parts(self) -> int: ...
    @property
    def rows(self) -> float: ...
    @property
    def pool(self) -> str: ...


class LayerSize(NamedTuple):
    """The plain data of a tracked layer; ``A_of`` is the layer whose input it shares, itself when alone, ``parts`` the most
    diagonal blocks that its second moments are kept in, ``rows`` how many inputs it sees for a token, and ``pool`` the layer
    under which the experts of a block share their moments; empty for all others."""

    name: str
    O: int
    I: int
    A_of: str
    block: int | None
    parts: int = 1
    rows: float = 1.0
    pool: str = ""


Layers = Sequence[Sized]


class Spec(NamedTuple):
    """A pass over data: what layers hold through it, what one of them takes beside in a batch, and what it multiplies.

    Example:
        >>> groups(layers, COVARIANCE.held, 2e9)  # the passes over the sample that a covariance takes in 2 GB
    """

    name: str
    held: Callable[[Layers], float]
    work: Callable[[Layers, int, Chunks], float]  # of so many tokens
    multiplications: Callable[[Sized, float], float]  # a token, in sequences of T tokens, beside the model's own


def leads(x: Sized) -> bool:
    return x.A_of == x.name


def own_input(x: Sized) -> str:
    """The layer whose inputs a layer is given: another one's, or its own, as those of an expert are."""
    return x.name if x.pool else x.A_of


def largest(layers: Layers) -> int:
    """Numbers of the largest gradient."""
    return max(x.O * x.I for x in layers)


def widest(layers: Layers) -> float:
    """Numbers of a token at the wider side of a layer."""
    return max(x.rows * max(x.O, x.I) for x in layers)


def diagonal(n: int, parts: int) -> list[int]:
    """The sides of ``parts`` blocks along the diagonal of an ``n x n`` matrix: even to one, and fewer than that where they would
    be less than ``NARROW`` wide."""
    count = max(1, min(parts, n // NARROW))
    return [end - start for start, end in pairwise(i * n // count for i in range(count + 1))]


def square(n: int, parts: int) -> int:
    """Numbers in these blocks."""
    return sum(k * k for k in diagonal(n, parts))


def sides(x: Sized) -> list[int]:
    """The sides of all blocks of a layer's ``S``, and of its ``A`` where it leads."""
    return [] if x.pool not in ("", x.name) else diagonal(x.O, x.parts) + (diagonal(x.I, x.parts) if leads(x) else [])


def moments_size(layers: Layers) -> int:
    """``S`` of each layer and ``A`` of each input, or their eigenvectors."""
    return SUM * sum(n * n for x in layers for n in sides(x))


def lam_size(layers: Layers) -> int:
    return SUM * sum(x.O * x.I for x in layers)


def _bases_and(numbers: int, layers: Layers) -> float:
    """Eigenvectors (of a shared input once) and so many numbers for each weight."""
    A, S = {x.A_of: square(x.I, x.parts) for x in layers}, {x.pool or x.name: square(x.O, x.parts) for x in layers}
    return SUM * (sum(A.values()) + sum(S.values()) + numbers * sum(x.O * x.I for x in layers))


def rotations(x: Sized, T: float) -> float:
    """A sequence's gradient in the eigenbases, a token: formed, and each side rotated where that is cheaper."""
    O, I, S, A = float(x.O), float(x.I), float(square(x.O, x.parts)), float(square(x.I, x.parts))
    return x.rows * (
        O * I + min(S, S * I / (x.rows * T)) + min(A if own_input(x) == x.name else 0.0, O * A / (x.rows * T))
    )


def _gradients_work(layers: Layers, tokens: int, at_once: Chunks) -> float:
    return 3 * max(at_once.gradients, SUM * largest(layers))


COVARIANCE = Spec(
    "covariance",
    moments_size,
    lambda layers, tokens, _: SUM * tokens * widest(layers),
    lambda x, T: x.rows * (square(x.O, x.parts) + (own_input(x) == x.name) * square(x.I, x.parts)) / 2,
)
CORRECTION = Spec(
    "correction",
    partial(_bases_and, 2),  # the sums of lam in two halves
    lambda layers, tokens, at_once: 2 * SUM * tokens * widest(layers) + _gradients_work(layers, tokens, at_once),
    rotations,
)
SELF_INFLUENCE = Spec("self-influence", partial(_bases_and, 1), CORRECTION.work, rotations)
DIAGONAL = Spec("diagonal", lambda layers: 2 * lam_size(layers), _gradients_work, lambda x, T: x.rows * x.O * x.I)


def groups(layers: Layers, held: Callable[[Layers], float], room: float) -> list[list[int]]:
    """The fewest runs of consecutive layers of which each holds at most ``room``; a larger layer is a run of its own."""
    found: list[list[int]] = []
    while (start := found[-1][-1] + 1 if found else 0) < len(layers):
        low, high = start + 1, len(layers)  # by halves: a mixture has thousands of layers
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if held(layers[start:middle]) <= room else (low, middle - 1)
        found.append(list(range(start, low)))
    return found


class Block(NamedTuple):
    """One block of a model: multiplications a token of its linear layers, and numbers a token that its attention mixes."""

    linear: float
    attention: float  # heads x width of a head: each of two products costs this much for every token looked at


class Shape(NamedTuple):
    """A model as far as counting goes."""

    layers: tuple[LayerSize, ...]
    blocks: tuple[Block, ...]
    below: float  # linear layers before the first block
    head: float  # linear layers after the last one
    lowest: float  # share of the lowest tracked block's linear layers that pass a gradient back
    lowest_attention: bool  # whether that block's attention does
    parameters: int
    activation: float  # numbers a token held for the backward pass
    widest: int  # numbers a token of the widest layer
    vocabulary: int
    narrow: float | None = None  # as ``activation``, in bfloat16, where norms and the like hold float32 beside

    def forward(self, T: float) -> float:
        """Multiplications a token."""
        return self.below + self.head + sum(b.linear + 2 * T * b.attention for b in self.blocks)

    def backward(self, T: float, layers: Layers | None = None) -> float:
        """Multiplications a token of the backward pass to activations, down to the lowest of ``layers`` (default: tracked)."""
        low = lowest_block(self.layers if layers is None else layers)
        if not self.blocks:
            return self.head + self.lowest * self.below
        above = sum(b.linear + 4 * T * b.attention for b in self.blocks[low + 1 :])
        last = self.blocks[low]
        return self.head + above + self.lowest * last.linear + 4 * T * last.attention * self.lowest_attention

    def step(self, T: float) -> float:
        """Multiplications a token of a plain training step: forward, and backward to activations and weights."""
        linear = self.below + self.head + sum(b.linear for b in self.blocks)
        return 3 * linear + 6 * T * sum(b.attention for b in self.blocks)


def lowest_block(layers: Layers) -> int:
    return min((x.block for x in layers if x.block is not None), default=0)


class Orders(NamedTuple):
    """Multiplications of one batch in one layer, by order of contraction."""

    tokens: float
    dense: float
    rebuilt: float


def orders(O: int, I: int, M: float, N: float, Q: int, R: int) -> Orders:
    """What a batch of ``M`` tokens in ``N`` sequences costs against ``Q`` queries of rank ``R``.

    tokens:  ``sum_t (g_t U) . (V a_t)``;  dense: each sequence's gradient, times every query;  rebuilt: as dense, with the
    queries multiplied out in each batch.
    """
    gradient = M * O * I + N * O * I * Q
    return Orders(M * (O + I) * Q * R, gradient, gradient + Q * O * I * R)


def solving(x: Sized, t: float, R: int | None) -> float:
    """One query of ``t`` tokens in one layer: into the eigenbasis, divided, compressed (or kept whole), and back."""
    O, I, S, A = x.O, x.I, square(x.O, x.parts), square(x.I, x.parts)
    t = min(t * x.rows, max(t, O, I))  # kept as rows or columns of the gradient where these are fewer
    into = t * (S + A + O * I)
    if R is None or min(O, I) <= R:
        return into + S * I + O * A
    width = R + OVERSAMPLE
    exact = width >= min(O, I) // 2
    compress = 10 * min(O, I) * O * I if exact else PRODUCTS * O * I * width + 10 * (O + I) * width * width
    return into + compress + R * (S + A)


class Asked(NamedTuple):
    """The queries of a trace."""

    queries: int
    tokens: int  # of one query
    rank: int | None  # None: full
    layer_scores: bool = False
    norms: int = 0  # dampings for which the lengths of gradients are measured in the scan


def norms_size(layers: Layers, asked: Asked) -> int:
    """Eigenvectors, and an inverse of the eigenvalues for each damping: what unit-norm scores hold through a scan."""
    alone = sum(square(x.O, x.parts) + square(x.I, x.parts) for x in layers if x.pool in ("", x.name))
    return SUM * bool(asked.norms) * (alone + asked.norms * sum(x.O * x.I for x in layers))


def solved_size(layers: Layers, asked: Asked) -> int:
    """One solved query over all layers, compressed (or whole)."""
    R = asked.rank
    return SUM * sum(x.O * x.I if R is None else (x.O + x.I) * min(R, x.O, x.I) for x in layers)


def query_size(layers: Layers, asked: Asked) -> int:
    """One query between its backward pass and the end of its solution: its tokens' factors, and what is solved of it."""
    held = sum((x.O + x.I) * min(asked.tokens * x.rows, x.O, x.I) for x in layers)
    return int(SUM * held) + solved_size(layers, asked)


class Contraction(NamedTuple):
    """How each layer is contracted with the queries, how many batches wait for queries that are multiplied out, and the bytes
    kept through a scan: the queries as they are laid out (two copies of the largest layer's where they are read again) and
    the batches that wait."""

    orders: dict[str, Order]
    hold: int
    held: float


def contraction(
    layers: Layers,
    M: float,
    N: float,
    asked: Asked,
    room: float = DENSE_BYTES,
    number: int = SUM,
    at_hand: bool = False,
) -> Contraction:
    """The cheapest order of each layer, by operations and memory, in numbers of ``number`` bytes.

    Sequence gradients are formed where that is cheaper than going by tokens, with their way to the memory and back and that of
    the queries.  These are then multiplied out once and held, if all that is held takes at most ``room`` bytes; else some
    batches wait, and the queries are multiplied out once for all of these.  Queries of layers that go by tokens stay in memory
    where there is room for them, else they are rebuilt too.

    Args:
        at_hand: compressed queries that are multiplied out stay in memory, instead of being read each time.
    """
    Q, R = asked.queries, asked.rank

    def dense(some: Layers) -> float:
        return number * Q * sum(x.O * x.I for x in some)

    if R is None:
        return Contraction(dict.fromkeys((x.name for x in layers), "dense"), 1, dense(layers))

    def compressed(some: Layers, item: int = number) -> float:
        return item * Q * R * sum(x.O + x.I for x in some)

    costs = {x.name: orders(x.O, x.I, M * x.rows, N, Q, R) for x in layers}
    formed = [x for x in layers if costs[x.name].dense + MOVED * (2 * N + Q) * x.O * x.I < costs[x.name].tokens]
    by_token = [x for x in layers if x not in formed]
    if dense(formed) <= DENSE_BYTES and dense(formed) + compressed(by_token) <= room:
        chosen: dict[str, Order] = {x.name: "dense" if x in formed else "tokens" for x in layers}
        return Contraction(chosen, 1, dense(formed) + compressed(by_token))

    def waiting(some: Layers) -> float:
        return number * M * sum(x.rows * (x.O + x.I) for x in some)

    def again(some: Layers) -> float:
        """Two copies of the largest layer's queries, as they are read or as they are laid out; of all that stay at hand."""
        return max((compressed([x], max(number, SUM)) for x in some), default=0.0) * 2 + at_hand * compressed(some)

    def hold_for(some: Layers, used: float) -> int:
        left = min(DENSE_BYTES, room - used - again(some))
        most = min(left, max(WAITING_BYTES, WAITING_SHARE * compressed(some, max(number, SUM))))
        return max(1, min(int(most / waiting(some)), round(ENOUGH * Q * R / M))) if some else 1

    if compressed(by_token) + again(layers) > room and not at_hand:
        by_token = []
    hold = hold_for([x for x in layers if x not in by_token], compressed(by_token))
    rebuilt = [
        x
        for x in layers
        if x not in by_token and (not by_token or costs[x.name].dense + Q * x.O * x.I * R / hold < costs[x.name].tokens)
    ]
    by_token = [x for x in layers if x not in rebuilt]
    hold = hold_for(rebuilt, compressed(by_token))
    held = compressed(by_token) + again(rebuilt) + (waiting(rebuilt) * hold if hold > 1 else 0.0)
    return Contraction({x.name: "rebuilt" if x in rebuilt else "tokens" for x in layers}, hold, held)
