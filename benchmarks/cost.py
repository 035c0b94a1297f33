"""Operations of each pass, the limit that follows, and what was reached: the tables of docs/cost.md.

    python benchmarks/cost.py [--model FOLDER] [--corpus FILE] [--queries 8] [--tokens 32768] [--repeats 3]
    python benchmarks/cost.py --model benchmarks/configs/llama-7b.json --seq-len 512 --queries 100
    python benchmarks/cost.py --layer 11008x4096 --seq-len 512 --queries 100

The first measures: everything is a multiple of a plain training step (forward and full backward) over the same batches, in
one run.  The others count, a model of which the configuration is enough or one layer of O x I, and measure nothing.
"""

import argparse
import statistics
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from scan import timed, training_pass

import upriver as up
from upriver.curvature.consumers import Correction, Covariance
from upriver.curvature.fit import CORRECTION_STREAM, COVARIANCE_STREAM
from upriver.influence.score import Score, route
from upriver.model.check import tracked_layers
from upriver.model.shape import config_only, config_shape, model_shape
from upriver.model.sweep import Labels, Source, sweep
from upriver.runtime.config import BATCH_TOKENS
from upriver.runtime.cost import CORRECTION, COVARIANCE, SUM, Asked, LayerSize, contraction, orders
from upriver.runtime.progress import show_bytes
from upriver.tensors import LowRank


def added(layers, chosen, T, M, N, Q, R):
    """Multiplications a token that each pass adds to forward and backward, over the tracked layers."""
    score = 0.0
    for x in layers:
        costs, order = orders(x.O, x.I, M, N, Q, R), chosen.orders[x.name]
        score += costs.dense + Q * x.O * x.I * R / chosen.hold if order == "rebuilt" else getattr(costs, order)
    return {
        "covariance": sum(COVARIANCE.multiplications(x, T) for x in layers),
        "correction": sum(CORRECTION.multiplications(x, T) for x in layers),
        "score": score / M,
    }


def count_layer(args):
    """Operations and bytes of each pass for one layer, without running anything."""
    O, I = map(int, args.layer.split("x"))
    T, M = args.seq_len, args.batch_tokens
    layer = LayerSize("layer", O, I, "layer", 0)
    print(
        f"O = {O:,}, I = {I:,}, sequences of {T} tokens, {M:,} tokens a batch, {args.queries} queries at rank {args.rank};"
    )
    print("for one token:\n")
    print("| pass | MFLOP | in training steps | bytes moved |\n|---|---|---|---|")
    for name, (multiplications, moved) in per_token(layer, T, M, args.queries, args.rank).items():
        step = multiplications / (3 * O * I)
        print(f"| {name} | {2e-6 * multiplications:,.2f} | {step:.2f} | {show_bytes(moved)} |")


def per_token(layer: LayerSize, T: float, M: float, Q: int, R: int) -> dict[str, tuple[float, float]]:
    """Multiplications and bytes moved of each pass in one layer, a token, in batches of ``M`` in sequences of ``T``."""
    O, I, OI = float(layer.O), float(layer.I), float(layer.O) * layer.I
    squares, ends = O * O + I * I, O + I
    numbers = {
        "forward": (OI, ends + OI / M),
        "backward to activations": (OI, ends + OI / M),
        "backward to weights": (OI, ends + OI / M),
        "covariances, full": (squares, ends + 2 * squares / M),
        "covariances, symmetric": (COVARIANCE.multiplications(layer, T), ends + squares / M),
        "correction, tokens turned": (OI + squares, 3 * ends + squares / M + 2 * OI / T + 4 * OI / M),
        "correction, gradients turned": (OI + OI * ends / T, ends + squares / M + 6 * OI / T + 4 * OI / M),
        "gradient of each sequence": (OI, ends + OI / T),
        "its dot with the queries": (OI * Q / T, OI / T + Q * OI / M),
        "queries multiplied out": (Q * OI * R / M, Q * (ends * R + OI) / M),
        "token path": (ends * Q * R, ends + 4 * Q * R + ends * Q * R / M),
    }
    return {name: (multiplications, SUM * moved) for name, (multiplications, moved) in numbers.items()}


def limits_of(shape, chosen, M, N, Q, R):
    """Each pass in plain training steps, as far as multiplications go."""
    T = M / N
    through, step = shape.forward(T) + shape.backward(T), shape.step(T)
    return {name: (through + more) / step for name, more in added(shape.layers, chosen, T, M, N, Q, R).items()}


def count_model(args):
    """The limits of a model of which only the configuration is there."""
    name, shape = config_shape(args.model, "mlp")
    M, N = float(args.batch_tokens), args.batch_tokens / args.seq_len
    print(f"{name}, {shape.parameters / 1e9:.1f}e9 parameters, sequences of {args.seq_len} tokens, rank {args.rank};")
    print("in plain training steps over the same tokens:\n")
    counted = [1, 8, args.queries] if args.queries > 8 else [args.queries]
    rows = {}
    for Q in counted:
        limits = limits_of(shape, contraction(shape.layers, M, N, Asked(Q, 1, args.rank)), M, N, Q, args.rank)
        rows |= {"covariance": limits["covariance"], "correction": limits["correction"]}
        rows[f"score, {Q} {'query' if Q == 1 else 'queries'}"] = limits["score"]
    print("| pass | counted limit |\n|---|---|")
    for name, limit in rows.items():
        print(f"| {name} | {limit:.2f} |")


def passes(args, folder):
    """The work of each pass on one model and corpus, a plain step over the same batches, and what each adds and costs."""
    model = up.load_model(args.model)
    corpus = up.Corpus.read(args.corpus, model.tokenizer, seq_len=args.seq_len)
    rows = corpus.sample(args.tokens, 0)
    batches = corpus.plan(args.batch_tokens, rows)
    layers = tracked_layers(model, corpus, "mlp")
    factors = up.fit(model, corpus, Path(folder) / "factors", max_tokens=8192)
    moments = {x.name: factors.moments(x.name) for x in layers}
    M = float(np.mean([corpus.lengths_N[rows].sum() for rows in batches]))
    N = float(np.mean([len(rows) for rows in batches]))
    chosen = contraction(layers, M, N, Asked(args.queries, 1, args.rank))
    sizes = {x.name: (x.O, x.I) for x in layers}
    random = {
        name: LowRank(torch.randn(args.queries, O, args.rank), torch.randn(args.queries, args.rank, I))
        for name, (O, I) in sizes.items()
    }
    routes = {name: route(chosen.orders[name], lambda v=v: v, args.queries, model.like) for name, v in random.items()}

    def run(consumer, stream=None):
        source = Source.of(corpus, rows, args.batch_tokens, Labels(0, stream))
        sweep(model, layers, source, rows, consumer)

    work = {
        "covariance": lambda: run(Covariance({}, torch.float32), COVARIANCE_STREAM),
        "correction": lambda: run(Correction({}, torch.float32, moments), CORRECTION_STREAM),
        "score": lambda: run(Score(routes, args.queries, False, chosen.hold)),
    }
    limits = limits_of(model_shape(model, layers, corpus), chosen, M, N, args.queries, args.rank)
    return work, lambda: training_pass(model, corpus, batches), limits, int(M)


def main():
    demo = resources.files("upriver") / "demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo / "speech-model"))
    parser.add_argument("--corpus", default=str(demo / "speeches.jsonl.xz"))
    parser.add_argument("--layer", help="OxI: count one layer instead of measuring a model")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.layer:
        return count_layer(args)
    if config_only(args.model):
        return count_model(args)

    with tempfile.TemporaryDirectory() as folder:
        work, step, limits, M = passes(args, folder)
        step()  # warm up
        ratios = {name: [] for name in work}
        for _ in range(args.repeats):
            for name, one in work.items():
                plain = timed(step)
                ratios[name].append(timed(one) / plain)
    print(f"{args.queries} queries at rank {args.rank}, {M} tokens a batch, {torch.get_num_threads()} threads;")
    print("in plain training steps over the same tokens:\n")
    print("| pass | counted limit | reached | share of the limit |\n|---|---|---|---|")
    for name, limit in limits.items():
        reached = statistics.median(ratios[name])
        print(f"| {name} | {limit:.2f} | {reached:.2f} | {limit / reached:.0%} |")
    return None


if __name__ == "__main__":
    main()
