"""What refining EK-FAC by conjugate gradients brings on the demo, judged on sequences that played no part, and what it costs.

    python benchmarks/refine.py [--questions 4] [--tokens 30000] [--held-out 240] [--steps 0 1 3 10 auto] [--combine 4096]
                                 [--factors FOLDER]

Factors of the demo (100,000 tokens), its first questions, refined over some 30,000 tokens of the sample that the factors were
fitted on, and judged by the held-out energy (docs/refine.md) over other sequences.  A pass is what a plain training step, forward
and backward, costs over the tokens that are refined on, in processor seconds, so that other programs count little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import upriver as up
from upriver.curvature.base import Damping, Grads
from upriver.curvature.choose import solver
from upriver.curvature.combined import Combined
from upriver.curvature.energy import held_out, judge
from upriver.influence.queries import gradients as query_gradients
from upriver.model.check import tracked_layers
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.runtime.system import settle_memory

DEMO = Path(up.__file__).parent / "demo"
BATCH_TOKENS, DAMPING = 1024, Damping(0.1)


def steps(text: str) -> int | str:
    return text if text == "auto" else int(text)


def spent(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def step(model: Model, corpus: up.Corpus, rows: np.ndarray) -> None:
    """A plain forward and full backward pass, every parameter with a gradient."""
    model.module.requires_grad_(True).train()
    for part in corpus.plan(2048, rows):
        model.task.loss(model.module, corpus.batch(part)).backward()
        model.module.zero_grad(set_to_none=True)
    model.module.requires_grad_(False).eval()


def predicted(
    model: Model, layers: list[Layer], corpus: up.Corpus, rows: np.ndarray, solutions: list[Grads]
) -> np.ndarray:
    """``- v . grad L(z)`` of some sequences with every solution, ``[N, Q]`` each: the scores, one sequence at a time."""
    names = [x.name for x in layers]
    v_SP = torch.cat([torch.cat([v[n].flatten(1) for n in names], 1) for v in solutions])
    found = []
    for row in rows:
        queries = Rows(corpus, row)
        g = query_gradients(model, layers, queries, [0])  # of log p, so of minus the loss
        found.append(v_SP @ torch.cat([g[n].flatten(1) for n in names], 1)[0])
    scores_NSQ = torch.stack(found).unflatten(1, (len(solutions), -1))
    return scores_NSQ.transpose(0, 1).double().numpy()


class Rows:
    """One sequence of a corpus as a question."""

    def __init__(self, corpus: up.Corpus, row: int):
        self.corpus, self.row = corpus, row
        self.lengths, self.ids, self.fingerprint = corpus.lengths_N[[row]], [str(row)], ""

    def __len__(self) -> int:
        return 1

    def batch(self, indices: object) -> object:
        b = self.corpus.batch(np.array([self.row]))
        return type(b)(b.rows_N, b.keys_N, b.inputs, b.real_NT, torch.ones(1), np.array([0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=30_000, help="to refine on")
    parser.add_argument("--held-out", type=int, default=240, help="sequences to judge on")
    parser.add_argument("--steps", type=steps, nargs="+", default=[0, 1, 3, 10, "auto"])
    parser.add_argument("--stop", type=int, default=120, help="further sequences that tell auto when to stop")
    parser.add_argument("--combine", type=int, nargs="*", default=[4096], help="tokens to combine three dampings on")
    parser.add_argument("--factors", type=Path, help="where they are, or go; default: a folder that is removed again")
    args = parser.parse_args()
    settle_memory(reuse=True)
    loaded = up.load_model(DEMO / "speech-model")
    corpus = up.Corpus.read(DEMO / "speeches.jsonl.xz", loaded.tokenizer, seq_len=128)
    queries = up.Queries.read(DEMO / "queries.jsonl").bound(loaded.tokenizer)
    asked = list(range(args.questions))
    with tempfile.TemporaryDirectory() as folder, loaded.computing_in("float32") as model:
        factors = up.fit(model, corpus, args.factors or folder, max_tokens=100_000)
        fitted = corpus.sample(factors.manifest["fit"]["tokens"], factors.options.seed)
        rng = np.random.default_rng(0)
        others = rng.permutation(np.setdiff1d(np.arange(len(corpus)), fitted))
        rows = corpus.sample(args.tokens, factors.options.seed)
        layers = tracked_layers(model, corpus, factors.options.layers)
        plain = min(spent(lambda: step(model, corpus, rows)) for _ in range(3))
        q = query_gradients(model, layers, queries, asked)
        solutions, told, lambdas = [], [], {}
        stops = np.sort(others[args.held_out :][: args.stop])
        for count in args.steps:
            curvature = solver(
                "ekfac", model, layers, corpus, rows, factors, refine=count, stops=stops, batch_tokens=BATCH_TOKENS
            )
            started = time.process_time()
            solution = curvature.solve(q, DAMPING)
            seconds = time.process_time() - started
            lambdas = curvature.lambdas(DAMPING)
            solutions.append(solution.value)
            told.append((solution.stats, seconds))
            print(f"{count} steps: {seconds:.0f} s, {solution.stats}", flush=True)
        for tokens in args.combine:
            few = corpus.sample(tokens, factors.options.seed + 1)  # of the whole corpus, but not those that judge
            few = np.setdiff1d(few, others[: args.held_out])
            combined = Combined(model, layers, corpus, few, factors.curvature())
            started = time.process_time()
            solution = combined.solve(q, DAMPING)
            solutions.append(solution.value)
            told.append((solution.stats | {"products": 0}, time.process_time() - started))
            print(f"combined on {tokens} tokens: {told[-1][1]:.0f} s", flush=True)
        judges, sets = others[: args.held_out], [q, *solutions]
        begun = time.process_time()
        vGv = held_out(model, layers, corpus, judges, sets, BATCH_TOKENS)
        seconds, tokens = time.process_time() - begun, int(corpus.lengths_N[judges].sum())
        found = [judge(q, v, g, lambdas) for v, g in zip(sets, vGv, strict=True)]
        scores = predicted(model, layers, corpus, rng.permutation(len(corpus))[:300], solutions)
    own, threads = int(corpus.lengths_N[rows].sum()), torch.get_num_threads()
    print(f"\n{own:,} tokens to refine on, {tokens:,} held out in {len(judges)} sequences, {threads} threads")
    each = seconds / plain * own / tokens / len(sets) / len(asked)
    print(f"a pass takes {plain:.1f} s of processor time; judging a vector takes {each:.2f} passes\n")
    ids, names = (
        [queries.ids[i] for i in asked],
        ["gradient", *(f"EK-FAC + {n}" for n in args.steps), *(f"three dampings, {n} tokens" for n in args.combine)],
    )
    for i, title in enumerate(["energy at the best scale", "best scale", "energy as it is"]):
        values = [judged[(2, 1, 0)[i]].tolist() for judged in found]
        table(title, ids, names, [[f"{x:.3g}" for x in row] for row in values])
    same = [[f"{np.corrcoef(s[:, k], scores[0][:, k])[0, 1]:.3f}" for k in range(len(ids))] for s in scores]
    table("correlation of 300 scores with EK-FAC's", ids, names[1:], same)
    cost = [
        [
            f"{x.get('products', 0) / len(ids):.0f}",
            f"{took / plain / len(ids):.1f}",
            f"{max(x.get('residual', [0])):.2g}",
        ]
        for x, took in told
    ]
    table("cost of a question", ["products", "passes", "largest residual on the sample"], names[1:], cost)


def table(title: str, columns: list[str], names: list[str], rows: list[list[str]]) -> None:
    print(f"| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in zip(names, rows, strict=True):
        print(f"| {name} | {' | '.join(row)} |")
    print()


if __name__ == "__main__":
    main()
