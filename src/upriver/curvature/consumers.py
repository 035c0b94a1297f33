"""What the passes of a fit sum up: the second moments of inputs and output gradients, and the eigenvalues in their bases.

Axes: N sequences, T positions, M real tokens, I inputs of a layer (+1 with a bias), O outputs.
"""

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.blocks import Moments
from upriver.kernels import add_second_moment, aligned
from upriver.model.layers import Layer
from upriver.runtime.artifact import Tensors
from upriver.runtime.split import GRADIENT_BYTES
from upriver.tensors import Scratch, even_parts, rotated_gradients, symmetric
from upriver.text.batch import Batch, real_calls


class Covariance:
    """Consumer: sums ``A`` over the real tokens of each input, ``S`` over the same tokens of each output (eq. 16)."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.real_NT = dtype, None
        self._lower: Tensors = {}
        self._counts: dict[str, int] = {}

    def begin(self, batch: Batch) -> None:
        self.real_NT = None if batch.real_NT is None or bool(batch.real_NT.all()) else batch.real_NT

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        g_MO = self._real(layer, g_NTO)
        self._add(f"S:{layer.name}", g_MO)
        self._counts[f"count:{layer.name}"] = self._counts.get(f"count:{layer.name}", 0) + len(g_MO)
        if layer.A_of == layer.name:
            self._add(f"A:{layer.name}", self._real(layer, a_NTI))

    def _real(self, layer: Layer, x_NTI: Tensor) -> Tensor:
        return x_NTI.flatten(0, 1) if self.real_NT is None else x_NTI[real_calls(self.real_NT, x_NTI, layer.name)]

    def _add(self, name: str, x_MI: Tensor) -> None:
        if name not in self._lower:
            self._lower[name] = x_MI.new_zeros(x_MI.shape[1], x_MI.shape[1], dtype=self.dtype)
        add_second_moment(self._lower[name], x_MI)

    def result(self) -> Tensors:
        """``A:layer`` ``[I, I]``, ``S:layer`` ``[O, O]`` and ``count:layer``, the number of tokens in them; given once."""
        sums = {name: symmetric(self._lower.pop(name)) for name in list(self._lower)}
        return sums | {name: torch.tensor([n], dtype=torch.int64) for name, n in self._counts.items()}


class Correction:
    """Consumer: sums squared rotated sequence gradients (eq. 20), in two halves by the parity of the sequences' keys.

    A rotated input is wider than I, with zeros at its end: a product into rows that do not start at multiples of 64 bytes takes
    up to a third longer, and those of a layer with a bias, with its column of ones, never do.
    """

    def __init__(self, dtype: torch.dtype, moments: dict[str, Moments] | None):
        self.dtype, self.moments = dtype, moments
        self._sums: Tensors = {}
        self._sequences_2 = torch.zeros(2, dtype=torch.int64)
        self._half_N: list[int] = []
        self._scratch = Scratch()
        self._rotated: tuple[str, Tensor] = ("", torch.empty(0))  # the last input, which the next layer may share

    def begin(self, batch: Batch) -> None:
        half_N = torch.from_numpy((batch.keys_N & np.uint64(1)).astype(np.int64))
        self._sequences_2 += torch.bincount(half_N, minlength=2)
        self._half_N = half_N.tolist()
        self._rotated = ("", torch.empty(0))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        (N, T, I), O = a_NTI.shape, g_NTO.shape[2]
        name = f"lam:{layer.name}"
        if name not in self._sums:
            self._sums[name] = g_NTO.new_zeros(2, O, I, dtype=self.dtype)
        Q_A_II, Q_S_OO = None, None
        if self.moments is not None:
            moments = self.moments[layer.name]
            Q_A_II, Q_S_OO = moments.Q_A_II, moments.Q_S_OO
            if T <= O:  # the input is rotated token by token, once for the layers that share it
                a_NTI, Q_A_II = self._rotated_input(layer, a_NTI, Q_A_II), None
            if T <= I:
                g_NTO, Q_S_OO = self._scratch.product("g", g_NTO, Q_S_OO), None
        sums_2OI = self._sums[name]
        for part in even_parts(N, max(1, GRADIENT_BYTES // (g_NTO.element_size() * O * a_NTI.shape[2]))):
            G_NOI = rotated_gradients(a_NTI[part], g_NTO[part], Q_A_II, Q_S_OO, self._scratch)
            for half, G_OI in zip(self._half_N[part], G_NOI[..., :I].to(self.dtype), strict=True):
                sums_2OI[half].addcmul_(G_OI, G_OI)

    def _rotated_input(self, layer: Layer, a_NTI: Tensor, Q_A_II: Tensor) -> Tensor:
        if self._rotated[0] != layer.A_of:
            self._rotated = (layer.A_of, self._scratch.product("input", a_NTI, Q_A_II, aligned(a_NTI.shape[2])))
        return self._rotated[1]

    def result(self) -> Tensors:
        """``lam:layer`` ``[2, O, I]``, sums of each half, and ``sequences`` ``[2]``, how many are in it; given once."""
        return {name: self._sums.pop(name) for name in list(self._sums)} | {"sequences": self._sequences_2}
