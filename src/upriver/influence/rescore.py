"""The second look: chosen sequences at full rank, token by token and layer by layer, and the counterfactual forms.

Axes: P pairs of a sequence and a query, L layers, N sequences, T positions, M tokens of a batch, Q queries; O outputs and I
inputs of a layer.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp

from upriver.curvature.base import Grads
from upriver.curvature.products import Tracked
from upriver.errors import ModelError
from upriver.influence.job import Job
from upriver.influence.queries import query_chunks
from upriver.influence.score import by_dense
from upriver.influence.solve import full
from upriver.kernels import matmul
from upriver.model.layers import Layer
from upriver.model.losses import LanguageModel
from upriver.model.model import Model
from upriver.model.sweep import Source, sweep
from upriver.runtime.artifact import Tensors, read_tensors
from upriver.runtime.units import each
from upriver.tensors import Scratch, on_cpu, product, sent
from upriver.text.batch import Batch, Sequences

SPURIOUS = 2 / 3
PAIRS = 16  # tokens of pairs, at least, that are counted as one that goes through the model
COLUMNS, TOKENS = 1024, 256  # of products that are made at once on the CPU, to stay in its caches


class Rescored(NamedTuple):
    """Full-rank scores of pairs (sequence, query): P pairs, T positions (zero past a sequence's end), L layers."""

    rows_P: np.ndarray
    queries_P: np.ndarray
    tokens_PT: Tensor
    layers_PL: Tensor


# queries that want the same sequences of a batch, these, and their pairs
Group = tuple[list[int], Tensor | slice, Tensor]


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
        n_P, q_P = np.array(pairs).T
        at_P = np.argsort(q_P, kind="stable")  # the pairs query by query
        queries, counts = (x.tolist() for x in np.unique(q_P, return_counts=True))
        self.n_P, self.q_P, at_P, n_of_P = sent(torch.from_numpy(np.stack([n_P, q_P, at_P, n_P[at_P]])), batch.device)
        found = list(zip(queries, n_of_P.split(counts), at_P.split(counts), strict=True))
        whole = [(q, at) for q, _, at in found if len(at) == len(batch.rows_N)]  # they are worked on together
        self.groups: list[Group] = [([q], n, at) for q, n, at in found if len(at) < len(batch.rows_N)]
        self.groups += [([q for q, _ in whole], slice(None), torch.cat([at for _, at in whole]))] if whole else []
        T = 1 if batch.real_NT is None else batch.real_NT.shape[1]
        tokens_PT, layers_PL = (torch.zeros(len(pairs), n, device=batch.device) for n in (T, len(self.place)))
        self.parts.append((batch.rows_N[n_P], q_P, tokens_PT, layers_PL))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        _, _, tokens_PT, layers_PL = self.parts[-1]
        v_QOI, T = self.solved[layer.name], tokens_PT.shape[1]
        totals_NQ = -by_dense(v_QOI, a_NTI, g_NTO, self.scratch).float()
        layers_PL[:, self.place[layer.name]] = totals_NQ[self.n_P, self.q_P]
        for queries, n, at in self.groups:
            by_token = -_by_token(a_NTI[n], g_NTO[n], v_QOI, queries)
            if layer.at_NT is not None:  # an expert, which sees some positions; what stands at none is zero
                places = layer.at_NT[n].clamp(min=0).repeat(len(queries), 1)
                by_token = tokens_PT.new_zeros(len(at), T).scatter_add(1, places, by_token.float())
            folded = by_token.reshape(len(at), -1, T).sum(1)  # a layer called twice: its calls added
            tokens_PT.index_add_(0, at, folded.float())

    def result(self) -> Rescored:
        width = max(p[2].shape[1] for p in self.parts)
        tokens = [nn.functional.pad(p[2], (0, width - p[2].shape[1])) for p in self.parts]
        rows, queries = (np.concatenate([p[i] for p in self.parts]) for i in (0, 1))
        return Rescored(rows, queries, torch.cat(tokens).cpu(), torch.cat([p[3] for p in self.parts]).cpu())


def _by_token(a_NTI: Tensor, g_NTO: Tensor, v_QOI: Tensor, queries: list[int]) -> Tensor:
    """``g_t^T v_q a_t``, ``[q N, T]``: the longer of the two goes through the product, so that what comes out of it is short."""
    turned = v_QOI.shape[1] <= v_QOI.shape[2]
    long_ML, short_MS = (x.flatten(0, 1) for x in ((a_NTI, g_NTO) if turned else (g_NTO, a_NTI)))
    M, S = short_MS.shape
    step, count = TOKENS if on_cpu(a_NTI) else M, max(1, COLUMNS // S)
    times = product if count == 1 else matmul  # rows of small products need not be laid out
    out_Mq = a_NTI.new_empty(M, len(queries))
    for i in range(0, len(queries), count):
        some = [v_QOI[q].T if turned else v_QOI[q] for q in queries[i : i + count]]
        v_LP = torch.cat(some, 1) if len(some) > 1 else some[0]
        for m in range(0, M, step):
            products_MQS = times(long_ML[m : m + step], v_LP).unflatten(1, (len(some), S))
            out_Mq[m : m + step, i : i + count] = products_MQS.mul_(short_MS[m : m + step, None]).sum(2)
    return out_Mq.T.reshape(-1, a_NTI.shape[1])


def rescore(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    solved: Grads,
    wanted: dict[int, list[int]],
    batch_tokens: int,
) -> Rescored:
    """Score the pairs ``wanted`` (corpus row -> slots of ``solved``) at full rank, in the dtype of ``model``."""
    source, consumer = Source.of(data, np.array(sorted(wanted)), batch_tokens), TokenScores(layers, solved, wanted)
    sweep(model, layers, source, source.rows, consumer)
    return consumer.result()


class Pairs(NamedTuple):
    """Some queries whose pairs have been rescored, and the files that hold them, each with the layers that it is of.

    Token scores add up over groups of layers, and over checkpoints, as those of layers do.
    """

    queries: list[int]
    parts: list[tuple[Path, slice]]

    def read(self) -> Rescored:
        tokens_PT, layers_PL, L = torch.zeros(1), torch.zeros(1), max(at.stop for _, at in self.parts)
        for number, (path, at) in enumerate(self.parts):
            part = read_tensors(path)
            if not number:
                tokens_PT = torch.zeros_like(part["tokens_PT"])
                layers_PL = torch.zeros(len(part["layers_PL"]), L)
            tokens_PT += part["tokens_PT"]
            layers_PL[:, at] += part["layers_PL"]
        return Rescored(part["rows_P"].numpy(), part["queries_P"].numpy(), tokens_PT, layers_PL)


def rescore_top(job: Job, wanted: list[np.ndarray]) -> list[Pairs]:
    """Full-rank scores of each query's wanted rows, in the model's dtype: a chunk of queries and a group of layers at a time."""
    # a pair takes as many multiplications as there are tracked weights, a token three times all weights, half as fast
    tracked = sum(x.O * x.I for x in job.layers)
    pairs = max(PAIRS, 6 * sum(x.numel() for x in job.model.module.parameters()) // max(1, tracked))
    how = {"bytes": job.division.rescore_bytes, "batch_tokens": job.division.batch_tokens, "pairs": pairs}
    chunks, found = _chunks(job, wanted, pairs), []
    for group, layers in zip(job.division.groups["rescore"], job.groups("rescore"), strict=True):
        whole = len(layers) == len(job.layers)
        name = "rescore" if whole else f"rescore, layers {group[0] + 1} to {group[-1] + 1}"
        stage = job.open("rescored" if whole else f"rescored/layers-{group[0]}-{group[-1]}", **how)
        with job.progress(name, sum(len(rows) for rows in wanted)) as advance:

            def compute(unit: int) -> Tensors:
                chunk = chunks[unit]
                pairs: dict[int, list[int]] = {}
                for slot, q in enumerate(chunk):
                    for row in wanted[q]:
                        pairs.setdefault(int(row), []).append(slot)
                solved = full(job, chunk, layers=layers)  # noqa: B023
                scored = rescore(job.model, layers, job.data, solved, pairs, job.division.batch_tokens)  # noqa: B023
                scored = scored._replace(queries_P=np.array(chunk)[scored.queries_P])
                advance(sum(len(wanted[q]) for q in chunk))
                return {name: torch.as_tensor(x) for name, x in scored._asdict().items()}

            found.append((each(stage, len(chunks), compute), slice(group[0], group[-1] + 1)))
    return [Pairs(queries, [(files[i], at) for files, at in found]) for i, queries in enumerate(chunks)]


def _chunks(job: Job, wanted: list[np.ndarray], pairs: int) -> list[list[int]]:
    """Chunks of queries that fit in memory at full rank and whose work makes about one unit: a sequence goes through the model
    once for all queries of a chunk, which takes as long as scoring it against so many ``pairs``."""
    chunks: list[list[int]] = []
    largest = max(job.groups("rescore"), key=lambda group: sum(x.O * x.I for x in group))
    for whole in query_chunks(largest, job.queries, None, job.division.rescore_bytes):
        tokens, seen = float("inf"), np.empty(0, np.int64)
        for q in whole:
            new, scored = (int(job.data.lengths_N[r].sum()) for r in (np.setdiff1d(wanted[q], seen), wanted[q]))
            if tokens + new + scored / pairs > job.opts.unit_tokens:
                chunks.append([])
                tokens, seen, new = 0.0, np.empty(0, np.int64), scored
            chunks[-1].append(q)
            tokens, seen = tokens + new + scored / pairs, np.union1d(seen, wanted[q])
    return chunks


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
    function, batch = Tracked(model, layers), batch.to(model.device)
    v_P = function.space.flatten({name: v_OI[None] for name, v_OI in v.items()})[0]
    with function.differentiable(), torch.no_grad():
        return jvp(lambda theta_P: task.log_probs(function.at(theta_P), batch), (function.theta_P,), (v_P,))[1]
