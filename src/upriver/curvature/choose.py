"""Every solver by its name."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from upriver.curvature.base import Curvature
from upriver.curvature.blocks import BlockCurvature, Eigenblock
from upriver.curvature.factors import Factors
from upriver.curvature.iterative import ConjugateGradient, Neumann
from upriver.curvature.products import Kind, Products
from upriver.curvature.spectral import Spectral
from upriver.errors import ConfigError
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.text.batch import Sequences

BLOCKS = ("ekfac", "kfac", "diagonal", "identity")
AUTO, EXPECTED = 50, 15  # steps of a refinement that stops by itself: at most, and as a plan counts them
SOLVERS: tuple[str, ...] = (*BLOCKS, "exact", "arnoldi", "nystrom", "cg", "lissa", "astra")


def needs_factors(kind: str) -> bool:
    """Whether a solver cannot do without fitted factors; conjugate gradients are preconditioned by them where they are given."""
    return kind in ("ekfac", "kfac", "diagonal", "astra")


def solver(
    kind: str,
    model: Model,
    layers: list[Layer],
    data: Sequences,
    rows: np.ndarray,
    factors: Factors | None = None,
    *,
    refine: int | Literal["auto"] = 0,
    stops: np.ndarray | None = None,
    rank: int = 100,
    steps: int | None = None,
    sequences: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    outside: Literal["damped", "projected"] = "damped",
    matrix: Kind = "gauss-newton",
    negative: Literal["refuse", "drop"] = "refuse",
    batch_tokens: int = 4096,
    memory_bytes: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Curvature:
    """The curvature ``kind``, one of ``SOLVERS``; Arnoldi, Nystrom and the exact one are assembled here, which takes products.

    Args:
        rows: the sequences of ``data`` whose mean Gauss-Newton matrix the matrix-free solvers multiply with.
        refine: so many steps of conjugate gradients on that matrix from the solution of a block curvature, preconditioned by it;
            auto: until the held-out energy on the sequences ``stops`` no longer rises, at most ``AUTO`` of them.
        rank: of Arnoldi and Nystrom.
        steps: at most so many, of conjugate gradients, LiSSA and ASTRA; None: 1,000.
        sequences: drawn in each step of LiSSA and ASTRA; None: all of ``rows``.
        tolerance: of the relative residual; None: 1e-5 for conjugate gradients, 1e-3 for the others.
        outside, negative: of Arnoldi, Nystrom and the exact one; see :class:`Spectral`.
        advance: see :class:`Products`.

    Raises:
        ConfigError: no such solver, factors that are missing, or a refinement of something else than a block curvature.
    """
    if kind not in SOLVERS:
        raise ConfigError(f"no such curvature: got {kind!r}; give one of {', '.join(SOLVERS)}")
    if needs_factors(kind) and factors is None:
        raise ConfigError(f"the curvature {kind!r} needs fitted factors: got none; give --factors")
    if refine and kind not in BLOCKS:
        raise ConfigError(f"only {', '.join(BLOCKS)} can be refined: got {kind!r}; leave out --refine")
    if kind in BLOCKS and not refine:
        return blocks(kind, layers, factors)
    product = Products(
        model, layers, data, rows, kind=matrix, batch_tokens=batch_tokens, memory_bytes=memory_bytes, advance=advance
    )
    start = (
        None if factors is None or kind == "identity" else blocks(kind if kind in BLOCKS else "ekfac", layers, factors)
    )
    spectral: dict[str, Any] = {"outside": outside, "negative": negative, "tolerance": tolerance or 1e-3}
    drawn = {"steps": 1000 if steps is None else steps, "sequences": sequences, "seed": seed}
    table: dict[str, Callable[[], Curvature]] = {
        "exact": lambda: Spectral.exact(product, **spectral),
        "arnoldi": lambda: Spectral.arnoldi(product, rank, None, seed, **spectral),
        "nystrom": lambda: Spectral.nystrom(product, rank, seed, **spectral),
        "lissa": lambda: Neumann(product, None, tolerance=tolerance or 1e-3, **drawn),
        "astra": lambda: Neumann(product, start, tolerance=tolerance or 1e-3, **drawn),
        "cg": lambda: ConjugateGradient(product, start, tolerance or 1e-5, drawn["steps"]),
    }
    # the identity is not in the units of the matrix: refining it is starting from nothing
    if kind in table:
        return table[kind]()
    if refine != "auto":
        return ConjugateGradient(product, start, tolerance or 1e-5, refine)
    if stops is None or not len(stops):
        raise ConfigError("refine='auto' stops by the energy on held-out sequences: got none; give some as stops")
    return ConjugateGradient(product, start, tolerance or 1e-5, AUTO, stops)


def blocks(kind: str, layers: list[Layer], factors: Factors | None) -> BlockCurvature:
    """A curvature of ``layers`` that is diagonal in a Kronecker basis; the identity takes no factors."""
    if kind == "identity":
        shapes = {x.name: (x.O, x.I) for x in layers}
        return BlockCurvature(shapes, lambda name: Eigenblock.identity(*shapes[name]))
    assert factors is not None
    return BlockCurvature([x.name for x in layers], lambda name: factors.block(name, kind))
