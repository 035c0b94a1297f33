"""Multiplications of every pass, layer by layer: pure arithmetic, written once, for the plan, the scan and docs/cost.md.

Axes: ``I`` inputs and ``O`` outputs of a layer, ``T`` tokens of a sequence, ``M`` tokens of a batch in ``N`` sequences,
``Q`` queries, ``R`` rank.  One multiplication is two floating-point operations (with its addition).

    pass                          multiplications a token and layer
    forward, backward             O I each (the backward pass goes to activations only, and not below the lowest tracked layer)
    covariances, full             O^2, and I^2 once for each input that layers share
    covariances, symmetric        half of that (BLAS ``syrk``), or 9/16 in the 8 block rows of wide ones
    correction                    O I, and for each side the cheaper of turning tokens (I^2) and gradients (O I I / T)
    gradient of each sequence     O I
    scores                        see :func:`orders`
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Order = Literal["tokens", "dense", "rebuilt"]
NUMBER = 4  # bytes
DENSE_BYTES = 1 << 30  # queries, or batches that wait for them, held through a scan; twice as much gains little
WAITING_BYTES = 768 << 20  # of batches that wait, at most, or so many times the solved queries:
WAITING_SHARE = 1.5
ENOUGH = 3  # batches wait until multiplying out takes a third of forming their gradients: longer pays little, and takes memory
MOVED = 32  # multiplications in the time of a number to or from the memory: `benchmarks/queries.py --queries 16 24 32`
OVERSAMPLE, PRODUCTS = 16, 10  # of the randomised singular value decomposition: extra columns, products with the matrix


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


class LayerSize(NamedTuple):
    """The plain data of a tracked layer."""

    name: str
    O: int
    I: int
    A_of: str  # the layer whose input it shares, itself when alone
    block: int | None


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
    # as ``activation``, in bfloat16, where norms and the like hold float32 beside; None: taken as no more numbers
    narrow: float | None = None

    def forward(self, T: float) -> float:
        """Multiplications a token."""
        return self.below + self.head + sum(b.linear + 2 * T * b.attention for b in self.blocks)

    def backward(self, T: float, layers: Sequence[Sized] | None = None) -> float:
        """Multiplications a token of the backward pass to activations, down to the lowest of ``layers`` (default: tracked)."""
        low = lowest_block(self.layers if layers is None else layers)
        above = sum(b.linear + 4 * T * b.attention for b in self.blocks[low + 1 :])
        if not self.blocks:
            return self.head + self.lowest * self.below
        last = self.blocks[low]
        return self.head + above + self.lowest * last.linear + 4 * T * last.attention * self.lowest_attention

    def step(self, T: float) -> float:
        """Multiplications a token of a plain training step: forward, and backward to activations and weights."""
        linear = self.below + self.head + sum(b.linear for b in self.blocks)
        return 3 * linear + 6 * T * sum(b.attention for b in self.blocks)


def lowest_block(layers: Sequence[Sized]) -> int:
    return min((x.block for x in layers if x.block is not None), default=0)


def leads(layer: Sized) -> bool:
    return layer.A_of == layer.name


def symmetric(n: int, blocks: int | None = None) -> float:
    """One triangle of ``x^T x``, a row of ``x``: exactly, or by block rows that are each as long as the diagonal asks."""
    return n * (n + n / (blocks or n)) / 2


def covariance(layer: Sized, blocks: int | None = None) -> float:
    """``A`` (once for each shared input) and ``S`` of one layer, a token; ``blocks=1`` for the full products."""
    return symmetric(layer.O, blocks) + (symmetric(layer.I, blocks) if leads(layer) else 0)


class Rotation(NamedTuple):
    """A sequence's gradient in the eigenbasis, a token: what each way of turning one side costs."""

    gradient: float
    left_tokens: float  # S side
    left_gradient: float
    right_tokens: float  # A side
    right_gradient: float

    @property
    def cheapest(self) -> float:
        return self.gradient + min(self.left_tokens, self.left_gradient) + min(self.right_tokens, self.right_gradient)


def correction(layer: Sized, T: float) -> Rotation:
    """An input that several layers share is turned once, for the first of them."""
    O, I = float(layer.O), float(layer.I)
    return Rotation(O * I, O * O, O * O * I / T, I * I if leads(layer) else 0.0, O * I * I / T)


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


def solve(layer: Sized, t: float, R: int | None) -> float:
    """One query of ``t`` tokens in one layer: into the eigenbasis, divided, compressed (or kept whole), and back."""
    O, I = layer.O, layer.I
    into = t * (O * O + I * I + O * I)
    if R is None or min(O, I) <= R:
        return into + O * I * (O + I)
    width = R + OVERSAMPLE
    exact = width >= min(O, I) // 2
    compress = 10 * min(O, I) * O * I if exact else PRODUCTS * O * I * width + 10 * (O + I) * width * width
    return into + compress + R * (O * O + I * I)


def rescore(layer: Sized, t: float, T: float, pairs: float) -> float:
    """One query at full rank in one layer, then ``pairs`` sequences token by token."""
    return solve(layer, t, None) + pairs * T * layer.O * (layer.I + 1)


class Cost(NamedTuple):
    """What one pass does for one token in one layer."""

    multiplications: float
    moved: float  # bytes: each operand read once and each result written once a batch, nothing kept in a cache


def per_token(layer: Sized, T: float, M: float, Q: int, R: int) -> dict[str, Cost]:
    """Each pass of the method in one layer, for batches of ``M`` tokens in sequences of ``T``; numbers of 4 bytes."""
    O, I, OI = float(layer.O), float(layer.I), float(layer.O) * layer.I
    turn, squares, ends = correction(layer, T), O * O + I * I, O + I
    numbers = {
        "forward": (OI, ends + OI / M),
        "backward to activations": (OI, ends + OI / M),
        "backward to weights": (OI, ends + OI / M),
        "covariances, full": (covariance(layer, 1), ends + 2 * squares / M),
        "covariances, symmetric": (covariance(layer), ends + squares / M),
        "correction, tokens turned": (OI + O * O + I * I, 3 * ends + squares / M + 2 * OI / T + 4 * OI / M),
        "correction, gradients turned": (
            OI + turn.left_gradient + turn.right_gradient,
            ends + squares / M + 6 * OI / T + 4 * OI / M,
        ),
        "gradient of each sequence": (OI, ends + OI / T),
        "its dot with the queries": (OI * Q / T, OI / T + Q * OI / M),
        "queries multiplied out": (Q * OI * R / M, Q * (ends * R + OI) / M),
        "token path": (ends * Q * R, ends + 4 * Q * R + ends * Q * R / M),
    }
    return {name: Cost(float(m), 4 * float(n)) for name, (m, n) in numbers.items()}


class Contraction(NamedTuple):
    """How each layer is contracted with the queries, and how many batches wait for queries that are multiplied out.

    ``held``: bytes kept through a scan, of the queries as they are laid out (two copies of the largest layer's where they are
    read again) and of the batches that wait.
    """

    orders: dict[str, Order]
    hold: int
    held: float = 0.0


def contraction(
    layers: Sequence[Sized],
    M: float,
    N: float,
    Q: int,
    R: int | None,
    room: float = DENSE_BYTES,
    number: int = NUMBER,
    at_hand: bool = False,
    most: float = math.inf,
) -> Contraction:
    """The cheapest order of each layer, by operations and memory, in numbers of ``number`` bytes.

    Sequence gradients are formed where that is cheaper than going by tokens, with their way to the memory and back and that of
    the queries.  These are then multiplied out once and held, if those of all such layers fit in ``room`` bytes; else the inputs
    and output gradients of some batches are, and the queries are multiplied out once for all of these.

    Args:
        at_hand: compressed queries that are multiplied out stay in memory, instead of being read each time.
        most: bytes of compressed queries that may stay for layers that go by tokens; where they take more, some of these are
            rebuilt instead.
    """

    def dense(some: Sequence[Sized]) -> float:
        return number * Q * sum(x.O * x.I for x in some)

    def compressed(some: Sequence[Sized]) -> float:
        return number * Q * (R or 0) * sum(x.O + x.I for x in some)

    def solved(some: Sequence[Sized]) -> float:
        """As they are read: in float32 at least."""
        return max(1.0, NUMBER / number) * compressed(some)

    def waiting(some: Sequence[Sized]) -> float:
        return number * M * sum(x.O + x.I for x in some)

    if R is None:
        return Contraction(dict.fromkeys((x.name for x in layers), "dense"), 1, dense(layers))
    costs = {x.name: orders(x.O, x.I, M, N, Q, R) for x in layers}
    formed = [x for x in layers if costs[x.name].dense + MOVED * (2 * N + Q) * x.O * x.I < costs[x.name].tokens]

    def shared(some: Sequence[Sized]) -> int:
        """How many batches wait for the queries of some layers to be multiplied out."""
        free = min(room - dense(whole), max(WAITING_BYTES, WAITING_SHARE * solved(some)))
        return max(1, min(int(free / waiting(some)), round(ENOUGH * Q * R / M))) if some else 1

    whole = formed if dense(formed) <= room else []
    rebuilt, hold = [], 1
    if not whole:
        hold = shared(formed)
        rebuilt = [x for x in formed if costs[x.name].dense + Q * x.O * x.I * R / hold < costs[x.name].tokens]
    by_token = [x for x in layers if x not in whole and x not in rebuilt]
    by_token.sort(key=lambda x: (costs[x.name].rebuilt - costs[x.name].tokens) / (x.O + x.I), reverse=True)
    while not at_hand and by_token and compressed(by_token) > most:
        rebuilt.append(by_token.pop())  # the one that gains most, or loses least, for the bytes
        hold = shared(rebuilt)
    again = max((solved([x]) for x in rebuilt), default=0.0)
    read = again + (compressed(rebuilt) if at_hand else again)
    held = compressed(by_token) + dense(whole) + read + (waiting(rebuilt) * hold if hold > 1 else 0.0)
    chosen: dict[str, Order] = dict.fromkeys((x.name for x in layers), "tokens")
    chosen.update(dict.fromkeys((x.name for x in whole), "dense"))
    chosen.update(dict.fromkeys((x.name for x in rebuilt), "rebuilt"))
    return Contraction(chosen, hold if rebuilt else 1, held)
