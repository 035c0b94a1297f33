"""A pass: what goes through the model, batch by batch, and a consumer that sees each layer of each batch.

    source = Source.of(corpus, rows, batch_tokens=2048)                  # sequences, and the scalar that is differentiated
    sweep(model, layers, source, source.rows, consumer)                  # consumer.begin(batch), consumer(layer, a_NTI, g_NTO)

Covariances, eigenvalues, query gradients, scores and the second look at the top are consumers of this one loop; nothing else
runs the model backward.  Queries are sequences like any other: their source has the measurement for its loss.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from upriver.model.capture import capture
from upriver.model.layers import Layer
from upriver.model.losses import Sampler
from upriver.model.model import Model
from upriver.runtime.units import spans
from upriver.text.batch import Batch, Sequences, plan


class Consumer(Protocol):
    """What a pass is for: it is told of each batch, and then given each layer of it, the last layer first."""

    def begin(self, batch: Batch) -> None: ...
    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None: ...


class Labels(NamedTuple):
    """Whose labels the loss takes: the corpus's own (``stream`` None), drawn from the model, or all of them.

    With ``output`` k of ``outputs`` C the scalar is the outputs along column k of a root of the loss's Hessian, times the root
    of C: the mean over k of what is squared of its gradients is the expectation over labels.
    """

    seed: int = 0
    stream: int | None = None
    output: int = 0
    outputs: int | None = None

    def sampler(self, batch: Batch) -> Sampler | None:
        return None if self.stream is None else Sampler(self.seed, self.stream, batch.keys_N)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        if self.outputs:
            h_NC = model.task.outputs(model.module, batch)
            return self.outputs**0.5 * (h_NC * model.task.root(h_NC.detach(), self.output)).sum()
        return model.task.loss(model.module, batch, self.sampler(batch))


class Source(NamedTuple):
    """What goes through the model: ``rows`` of something with lengths, and the scalar of a batch that is differentiated."""

    lengths_N: np.ndarray
    batch: Callable[[np.ndarray], Batch]
    loss: Callable[[Model, Batch], Tensor]
    rows: np.ndarray
    batch_tokens: int
    again: tuple[Callable[[Model, Batch], Tensor], ...] = ()  # further scalars: each batch is a batch again with each

    @classmethod
    def of(cls, data: Sequences, rows: np.ndarray, batch_tokens: int, *labels: Labels) -> "Source":
        """The training loss of some sequences of a corpus, with its own labels, or with each of ``labels`` in turn."""
        loss, *again = [x.loss for x in labels or (Labels(),)]
        return cls(data.lengths_N, data.batch, loss, np.asarray(rows, np.int64), batch_tokens, tuple(again))

    def units(self, unit_tokens: int | None = None, most_rows: int | None = None) -> list[np.ndarray]:
        """Spans of the rows, each a unit of work; see :func:`upriver.runtime.units.spans`."""
        return [self.rows[at] for at in spans(np.asarray(self.lengths_N)[self.rows], most_rows, unit_tokens)]

    def batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some rows in batches of at most ``batch_tokens`` positions, padding counted, the longest first."""
        return plan(self.lengths_N, self.batch_tokens, rows)

    def tokens(self, rows: np.ndarray) -> int:
        return int(np.asarray(self.lengths_N)[rows].sum(dtype=np.int64))


def sweep(
    model: Model,
    layers: list[Layer],
    source: Source,
    rows: np.ndarray,
    consumer: Consumer,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> None:
    """Run ``rows`` of a source forward and backward, and let ``consumer`` see each of ``layers`` of each batch.

    Args:
        advance: called with the tokens of each batch when it is done.

    Raises:
        NumericalError: the loss is NaN or infinite.
        ModelError: a layer cannot be laid out by sequence and token.
    """
    with capture(model.module, layers, consumer, model.handed) as run:
        for batch in _ahead(source, rows, model):
            for loss in (source.loss, *source.again):
                consumer.begin(batch)
                run(len(batch.rows_N), model.task.positions(batch), lambda b=batch, of=loss: of(model, b))
            advance(source.tokens(batch.rows_N) if batch.query_N is None else len(batch.rows_N))


def _ahead(source: Source, rows: np.ndarray, model: Model) -> Iterator[Batch]:
    """The batches in order, each read and moved to the device while the one before it is computed.

    A GPU copies it on a stream of its own: on that of the passes it would come after all that they were given before.
    """
    device = model.device
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(some: np.ndarray) -> tuple[Batch, Any]:
        batch = model.task.arranged(model.module, source.batch(some))
        if copies is None:
            return batch.to(device), None
        with torch.cuda.stream(copies):
            return batch.to(device), copies.record_event()

    def ready(batch: Batch, copied: Any) -> Batch:
        if copied is not None:
            passes = torch.cuda.current_stream(device)
            passes.wait_event(copied)
            batch.used_on(passes)
        return batch

    with ThreadPoolExecutor(1) as reader:
        coming = None
        for some in [*source.batches(rows), None]:
            following = some if some is None else reader.submit(read, some)
            if coming is not None:
                yield ready(*coming.result())
            coming = following
