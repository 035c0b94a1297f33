"""The largest numbers of a stream."""

import numpy as np


class Best:
    """The ``k`` largest numbers of a stream and their places, largest first.

    Of equal numbers those of the smaller ``ties`` go first, and without ties those that came first.
    """

    def __init__(self, k: int):
        self.k = k
        self.values, self.places, self.ties = (np.empty(0, kind) for kind in (np.float32, np.int64, np.uint64))

    def add(self, values_C: np.ndarray, places_C: np.ndarray, ties_C: np.ndarray | None = None) -> None:
        ties_C = np.zeros(len(values_C), np.uint64) if ties_C is None else ties_C
        if len(self.values) == self.k:
            last = self.values[-1]
            better = (values_C > last) | (values_C == last) & (ties_C < self.ties[-1])
            values_C, places_C, ties_C = values_C[better], places_C[better], ties_C[better]
        if len(values_C):
            values, places = np.append(self.values, values_C), np.append(self.places, places_C)
            ties = np.append(self.ties, ties_C)
            order = np.lexsort((ties, -values))[: self.k]
            self.values, self.places, self.ties = values[order], places[order], ties[order]
