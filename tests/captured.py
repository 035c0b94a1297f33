"""What capture hands over, kept by layer and corpus row."""

import numpy as np

from upriver.model.check import tracked_layers
from upriver.model.sweep import Labels, Source, sweep
from upriver.tensors import sequence_gradients
from upriver.text.batch import Batch


class Keep:
    """Consumer: everything that capture hands over, by layer and corpus row."""

    def __init__(self):
        self.a, self.g, self.grads, self.real_NT = {}, {}, {}, None

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, layer, a_NTI, g_NTO) -> None:
        for n, row in enumerate(self.batch.rows_N.tolist()):
            self.a[layer.name, row], self.g[layer.name, row] = a_NTI[n], g_NTO[n]
            self.grads[layer.name, row] = sequence_gradients(a_NTI, g_NTO)[n]


def kept(c, batch_tokens: int, labels: Labels = Labels(), spec: str | None = None) -> Keep:  # noqa: B008
    keep, layers = Keep(), tracked_layers(c.model, c.data, spec or c.spec)
    source = Source.of(c.data, np.arange(len(c.data)), batch_tokens, labels)
    sweep(c.model, layers, source, source.rows, keep)
    return keep
