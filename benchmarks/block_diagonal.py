"""What second moments in diagonal blocks cost in accuracy, and save, on the demo.

    python benchmarks/block_diagonal.py [--blocks 1 2 4 8] [--tokens 32768] [--questions 4] [--sequences 200] [--held-out 60]

One fit for each number of blocks, of the same sequences with the same labels.  Scores are at full rank, and compared with those
of one block; solutions are judged on sequences that no fit saw (docs/refine.md), beside the plain gradient.  The layers of the
demo are 160 and 432 wide, so the time of decompositions is that of a wider matrix besides (``--side``).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import upriver as up
from upriver.curvature.base import Damping
from upriver.curvature.energy import held_out, judge
from upriver.influence.queries import gradients
from upriver.influence.rescore import rescore
from upriver.kernels import one_core_each
from upriver.model.check import tracked_layers
from upriver.model.planned import timed
from upriver.runtime.cost import diagonal, moments_size
from upriver.tensors import eigh

DEMO = Path(up.__file__).parent / "demo"
DAMPING, BATCH_TOKENS = Damping(), 1024


def decomposition(side: int, blocks: int) -> float:
    """Seconds for the blocks of one matrix in float64, with one thread."""
    matrices = []
    for n in diagonal(side, blocks):
        x = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        matrices.append(x @ x.T)
    with one_core_each(1) as pool:
        return pool.submit(timed, lambda: [eigh(m) for m in matrices], torch.device("cpu"), 2).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=32_768, help="to fit on")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=200, help="to score")
    parser.add_argument("--held-out", type=int, default=60, help="sequences to judge on")
    parser.add_argument("--side", type=int, default=2048, help="of a wide matrix that is decomposed")
    args = parser.parse_args()
    model = up.load_model(DEMO / "speech-model")
    corpus = up.Corpus.read(DEMO / "speeches.jsonl.xz", model.tokenizer, seq_len=128)
    queries, asked = up.Queries.read(DEMO / "queries.jsonl").bound(model.tokenizer), list(range(args.questions))
    layers = tracked_layers(model, corpus, "mlp")
    q = gradients(model, layers, queries, asked)
    solutions, facts, lambdas = [], [], {}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            factors = up.fit(model, corpus, folder, max_tokens=args.tokens, blocks=blocks)
            fitted = corpus.sample(factors.manifest["fit"]["tokens"], factors.options.seed)
            lambdas = factors.curvature().lambdas(DAMPING)
            solutions.append(factors.curvature().solve(q, DAMPING).value)
            took = factors.manifest["timings"]["eigendecomposition"]
        size = moments_size([x._replace(parts=blocks) for x in layers])
        facts.append([f"{size / 1e6:.2f}", f"{took:.2f}", f"{decomposition(args.side, blocks):.2f}"])
    others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(corpus)), fitted))
    rows, judges = others[: args.sequences], others[-args.held_out :]
    wanted = {int(row): asked for row in rows}
    scores = []
    for v in solutions:
        found = rescore(model, layers, corpus, v, wanted, 2048)
        place = np.lexsort((found.rows_P, found.queries_P))
        scores.append(found.layers_PL.sum(1).double().numpy()[place].reshape(len(asked), len(rows)))
    sets = [q, *solutions]
    along = held_out(model, layers, corpus, judges, sets, BATCH_TOKENS)
    energies = [judge(q, v, vGv, lambdas)[2] for v, vGv in zip(sets, along, strict=True)]
    print(
        f"{args.tokens:,} tokens fitted on, {len(asked)} questions, {len(rows)} sequences scored, {len(judges)} held out\n"
    )
    wide, means = f"{args.side:,} wide, s", ["correlation, mean", "worst", "energy, mean", "worst"]
    names = ["bases, MB", "decomposed, s", wide, *means]
    print(f"| blocks | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for blocks, fact, own, energy in zip(args.blocks, facts, scores, energies[1:], strict=True):
        same = [float(np.corrcoef(*pair)[0, 1]) for pair in zip(own, scores[0], strict=True)]
        ratio = energy / energies[1]
        told = [f"{sum(same) / len(same):.4f}", f"{min(same):.4f}", f"{ratio.mean():.3f}", f"{ratio.min():.3f}"]
        print(f"| {blocks} | {' | '.join([*fact, *told])} |")
    plain = energies[0] / energies[1]
    print(
        f"\nenergies are over those of {args.blocks[0]} block; that of the plain gradient is {plain.mean():.3f} of it"
    )


if __name__ == "__main__":
    main()
