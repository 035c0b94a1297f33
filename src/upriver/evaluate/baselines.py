"""What influence has to be better than: simple scores of every sequence for every query, to stand beside each accuracy table.

    bm25            the words that they share                    activations     projection on what tells the answer apart
    cosine          cosine of gradients, in no metric            loss            of the sequence, whatever is asked
    repsim          cosine of mean hidden states                 gradient_norm   length of its gradient, whatever is asked
    random          normal numbers

Axes: N sequences, Q queries, T positions, H width of the hidden states, W distinct words of the queries.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from upriver.curvature.base import Damping
from upriver.curvature.choose import blocks
from upriver.errors import ConfigError
from upriver.influence.normed import Lengths, Normed, unit_norm
from upriver.influence.queries import Measured, batches, gradients
from upriver.influence.score import Score, route
from upriver.model.capture import frozen
from upriver.model.check import tracked_layers
from upriver.model.layers import LINEAR
from upriver.model.model import Model
from upriver.model.parts import by_position, given
from upriver.model.sweep import Source, sweep
from upriver.text.batch import Batch, Sequences
from upriver.text.candidates import Tfidf
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries

BATCH_TOKENS = 2048
K1, B = 1.5, 0.75  # of BM25: how soon a repeated word counts no more, and how much a long sequence is held back


def baseline(
    name: str, model: Model, corpus: Sequences, queries: Measured, *, layers: str | None = None, seed: int = 0
) -> np.ndarray:
    """Scores of one of ``BASELINES`` for every sequence and query, float64 ``[N, Q]``.

    Larger means, as with influence, that the sequence is taken to raise the measurement; ``loss`` (in nats) and
    ``gradient_norm`` are the same for all queries.

    Args:
        layers: whose gradients ``cosine`` and ``gradient_norm`` take; None: as of a fit.
        seed: of ``random``.

    Raises:
        ConfigError: no such baseline, or ``bm25`` of what is no text.
        ModelError: there is no such layer, or the task has no ``outputs`` for the hidden states.

    Example:
        >>> up.baseline("bm25", model, corpus, queries).shape
    """
    if name not in BASELINES:
        raise ConfigError(f"no such baseline: got {name!r}; give one of {', '.join(BASELINES)}")
    return BASELINES[name](model, corpus, queries, layers or model.default_layers, seed)


def bm25(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    """BM25 (as Lucene has it) on the model's tokens: of each word of the query, as often as it stands there,
    ``IDF tf / (tf + k1 (1 - b + b length / mean length))``."""
    if not isinstance(corpus, Corpus) or not isinstance(queries, Queries):
        raise ConfigError("bm25 compares words: got a corpus or queries that are no text; choose another baseline")
    words, found_NQ = Tfidf(corpus, queries), np.zeros((len(corpus), len(queries)))
    tokens_N = [corpus.token_ids(row) for row in range(len(corpus))]
    mean = float(np.mean([len(tokens) for tokens in tokens_N]))
    for found_Q, tokens in zip(found_NQ, tokens_N, strict=True):
        at = words.place[tokens]
        count_W = np.bincount(at[at >= 0], minlength=words.n_words)
        weight_W = words.idf_W1[:, 0] * count_W / (count_W + K1 * (1 - B + B * len(tokens) / mean))
        found_Q[:] = [weight_W[terms].sum() for terms in words.terms_Q]
    return found_NQ


def cosine(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    """Cosine of ``grad f`` and ``- grad L(z)``."""
    q = gradients(model, tracked_layers(model, corpus, layers), queries)
    energy_Q = torch.stack([q_QOI.double().square().sum((1, 2)) for q_QOI in q.values()]).sum(0)
    scores_NQ, own_N1 = _plain(model, corpus, layers, q)
    return unit_norm(scores_NQ, own_N1, energy_Q.cpu().numpy()).astype(np.float64)


def gradient_norm(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    return np.sqrt(_plain(model, corpus, layers, {})[1]).repeat(len(queries), 1)


def _plain(model: Model, corpus: Sequences, spec: str, q: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Gradient dot products with the queries ``[N, Q]`` and squared lengths ``[N, 1]``, in one pass."""
    chosen, Q = tracked_layers(model, corpus, spec), max(map(len, q.values()), default=0)
    own = Lengths(blocks("identity", chosen, None), chosen, [Damping(0.0, False)], model.like)
    routes = {x.name: route("dense", lambda name=x.name: q[name], Q, model.like) for x in chosen if q}
    consumer = Normed(Score(routes, Q, False), own) if q else own
    source = Source.of(corpus, np.arange(len(corpus)), BATCH_TOKENS)
    sweep(model, chosen, source, source.rows, consumer)
    found = consumer.result()
    return found.get("scores", torch.zeros(len(corpus), 0)).numpy(), found["self"].double().numpy()


def loss(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    with frozen(model.module), torch.no_grad():
        batches = (corpus.batch(np.array([row])).to(model.device) for row in range(len(corpus)))
        found_N = np.array([float(model.task.loss(model.module, batch)) for batch in batches])
    return found_N[:, None].repeat(len(queries), 1)


def repsim(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    """Cosine of the mean hidden states of the sequence and of prompt with completion (contrasts left out)."""
    h_NH = _sequences(model, corpus)
    asked_QH = torch.stack([_mean(model, queries, q, 1.0, True, h_NH[0]) for q in range(len(queries))])
    return nn.functional.cosine_similarity(h_NH[:, None], asked_QH[None], dim=2).numpy()


def activations(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    """Projection of a sequence's mean hidden state, less that of the corpus, on a direction of length 1: from the mean hidden
    state of the contrast (without one: of the corpus) to that of the completion."""
    h_NH = _sequences(model, corpus)
    mean_H, found = h_NH.mean(0), []
    for q in range(len(queries)):
        there_H, away_H = (_mean(model, queries, q, weight, False, mean_H) for weight in (1.0, -1.0))
        found.append((h_NH - mean_H) @ nn.functional.normalize(there_H - away_H, dim=0))
    return torch.stack(found, 1).numpy()


def random(model: Model, corpus: Sequences, queries: Measured, layers: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((len(corpus), len(queries)))


def hidden(model: Model, batch: Batch) -> Tensor:
    """What the last linear layer of a model is given, float64 ``[N, T, H]``: of a language model the last hidden states."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[:] = [by_position(module, given(args, kwargs))]

    hooks = [
        m.register_forward_pre_hook(note, with_kwargs=True) for m in model.module.modules() if isinstance(m, LINEAR)
    ]
    try:
        with frozen(model.module), torch.no_grad():
            model.task.outputs(model.module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0].reshape(len(batch.rows_N), -1, seen[0].shape[-1]).double()


def _sequences(model: Model, corpus: Sequences) -> Tensor:
    """The mean hidden state of each sequence, ``[N, H]``, on the host."""
    found: dict[int, Tensor] = {}
    for rows in corpus.plan(BATCH_TOKENS):
        batch = corpus.batch(rows).to(model.device)
        found |= dict(zip(rows.tolist(), _averaged(hidden(model, batch), batch.real_NT).cpu(), strict=True))
    return torch.stack([found[row] for row in range(len(corpus))])


def _mean(model: Model, queries: Measured, q: int, weight: float, whole: bool, without_H: Tensor) -> Tensor:
    """The mean hidden state over a query's rows of a weight of that sign (1: completion, -1: contrast), ``[H]``.

    Args:
        whole: over the prompt too, where there is one.
        without_H: what is given where there is no such row.
    """
    found = []
    for batch in batches(queries, [q]):
        own_N = torch.ones(len(batch.rows_N)) if batch.weight_N is None else batch.weight_N
        batch = batch.to(model.device)
        where_NT = batch.real_NT if whole else batch.inputs.get("loss", batch.real_NT)
        if (own_N.sign() == weight).any():
            found.append(_averaged(hidden(model, batch), where_NT).cpu()[own_N.sign() == weight])
    return torch.cat(found).mean(0) if found else without_H


def _averaged(h_NTH: Tensor, where_NT: Tensor | None) -> Tensor:
    if where_NT is None:
        return h_NTH.mean(1)
    return (h_NTH * where_NT[..., None]).sum(1) / where_NT.sum(1, keepdim=True).clamp(min=1)


Baseline = Callable[[Model, Sequences, Measured, str, int], np.ndarray]
BASELINES: dict[str, Baseline] = {
    f.__name__: f for f in (bm25, cosine, repsim, activations, loss, gradient_norm, random)
}
