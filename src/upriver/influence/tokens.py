"""Full-rank scores of chosen sequences, token by token and layer by layer, and the counterfactual forms of the appendix.

Axes: P pairs of a sequence and a query, L layers, N sequences, T positions, M tokens of a batch, Q queries; O outputs and I
inputs of a layer.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp

from upriver.curvature.base import Grads
from upriver.curvature.products import Tracked
from upriver.errors import ModelError
from upriver.influence.score import by_dense
from upriver.model.layers import Layer
from upriver.model.load import Model
from upriver.model.losses import LanguageModel
from upriver.model.sweep import Labels, sweep
from upriver.tensors import Scratch, product
from upriver.text.batch import Batch, Sequences

SPURIOUS = 2 / 3


class Rescored(NamedTuple):
    """Full-rank scores of pairs (sequence, query): P pairs, T positions (zero past a sequence's end), L layers."""

    rows_P: np.ndarray
    queries_P: np.ndarray
    tokens_PT: Tensor
    layers_PL: Tensor


class TokenScores:
    """Consumer: ``- sum_l g_lt^T v_l a_lt`` (eq. 31) for the wanted pairs, and each layer's total by its own contraction.

    The two are computed apart, so that *sum over tokens = sum over layers* is a check and not a definition.
    """

    def __init__(self, layers: list[Layer], solved: Grads, wanted_RQ: dict[int, list[int]]):
        self.place = {x.name: i for i, x in enumerate(layers)}
        self.solved, self.wanted = solved, wanted_RQ
        self.parts: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor]] = []
        self.scratch = Scratch()

    def begin(self, batch: Batch) -> None:
        pairs = [(n, q) for n, row in enumerate(batch.rows_N) for q in self.wanted[int(row)]]
        self.n_P, self.q_P = (torch.tensor(x, dtype=torch.long) for x in zip(*pairs, strict=True))
        T = 1 if batch.real_NT is None else batch.real_NT.shape[1]
        tokens_PT, layers_PL = torch.zeros(len(pairs), T), torch.zeros(len(pairs), len(self.place))
        self.parts.append((batch.rows_N[self.n_P.numpy()], self.q_P.numpy(), tokens_PT, layers_PL))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        _, _, tokens_PT, layers_PL = self.parts[-1]
        v_QOI = self.solved[layer.name]
        totals_NQ = -by_dense(v_QOI, a_NTI, g_NTO, self.scratch).float().cpu()
        layers_PL[:, self.place[layer.name]] = totals_NQ[self.n_P, self.q_P]
        for q in self.q_P.unique().tolist():
            at = (self.q_P == q).nonzero()[:, 0]
            n = slice(None) if len(at) == len(a_NTI) else self.n_P[at].to(a_NTI.device)
            by_token = -_by_token(a_NTI[n], g_NTO[n], v_QOI[q])
            folded = by_token.reshape(len(at), -1, tokens_PT.shape[1]).sum(1)  # a layer called twice: its calls added
            tokens_PT[at] += folded.float().cpu()

    def result(self) -> Rescored:
        width = max(p[2].shape[1] for p in self.parts)
        tokens = [nn.functional.pad(p[2], (0, width - p[2].shape[1])) for p in self.parts]
        rows, queries = (np.concatenate([p[i] for p in self.parts]) for i in (0, 1))
        return Rescored(rows, queries, torch.cat(tokens), torch.cat([p[3] for p in self.parts]))


def _by_token(a_NTI: Tensor, g_NTO: Tensor, v_OI: Tensor) -> Tensor:
    """``g_t^T v a_t``, ``[N, T]``: the longer of the two goes through the product, so that what comes out of it is short."""
    O, I = v_OI.shape
    long, short, v_LS = (g_NTO, a_NTI, v_OI) if O > I else (a_NTI, g_NTO, v_OI.T)
    products_MS = product(long.flatten(0, 1), v_LS).mul_(short.flatten(0, 1))
    return products_MS.sum(1).view(a_NTI.shape[:2])


def rescore(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    solved: Grads,
    wanted: dict[int, list[int]],
    batch_tokens: int,
) -> Rescored:
    """Score the pairs ``wanted`` (corpus row -> slots of ``solved``) at full rank, in the dtype of ``model``."""
    batches = data.plan(batch_tokens, np.array(sorted(wanted)))
    consumer = TokenScores(layers, solved, wanted)
    sweep(model, layers, data, batches, consumer, Labels())
    return consumer.result()


def spurious(token_scores_T: np.ndarray) -> bool:
    """Whether so few tokens carry the score that it may be an accident: ``||tok||_2 / ||tok||_1 > 2/3``."""
    total = np.abs(token_scores_T).sum()
    return bool(total > 0 and np.sqrt(np.square(token_scores_T).sum()) / total > SPURIOUS)


def output_token_influence(model: Model, layers: list[Layer], batch: Batch, v: Grads) -> Tensor:
    """Each token's counterfactual influence: the derivative of its log-probability along ``v`` (eq. 36), ``[N, T]``.

    Exact, by forward-mode differentiation.  The sum over tokens is the total influence.

    Args:
        v: the solved query ``(G + lambda I)^-1 grad f``, ``[O, I]`` for every layer.

    Raises:
        ModelError: the task is not a language model.
    """
    task = model.task
    if not isinstance(task, LanguageModel):
        raise ModelError(f"output-token influence needs a language model: got the task {task.name!r}")
    function = Tracked(model, layers)
    v_P = function.space.flatten({name: v_OI[None] for name, v_OI in v.items()})[0]
    with function.differentiable(), torch.no_grad():
        return jvp(lambda theta_P: task.log_probs(function.at(theta_P), batch), (function.theta_P,), (v_P,))[1]
