"""Operations of each pass, the limit that follows, and what was reached: the table of docs/cost.md.

    python benchmarks/cost.py [--model FOLDER] [--corpus FILE] [--queries 8] [--tokens 32768] [--repeats 3]

Everything is a multiple of a plain training step (forward and full backward) over the same batches, in one run.
"""

import argparse
import statistics
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scan import timed, training_pass

import upriver as up
from upriver.curvature.fit import CORRECTION_STREAM, COVARIANCE_STREAM, Correction, Covariance
from upriver.influence.score import Score, choose_orders, count, route
from upriver.model.layers import Layer, weight_shape
from upriver.model.sweep import Labels, sweep, tracked_layers
from upriver.tensors import LowRank


class Counts(NamedTuple):
    """Multiplications per token."""

    forward: float
    backward: float  # to activations, from the loss to the lowest tracked layer
    step: float  # forward, and backward to activations and weights


def linear_sizes(module: torch.nn.Module) -> float:
    return float(sum(np.prod(weight_shape(m)) for m in module.modules() if isinstance(m, torch.nn.Linear)))


def model_counts(model: up.Model, layers: list[Layer], T: float) -> Counts:
    """Linear layers (the head included) and the two attention products; what lies below the lowest layer is not passed back."""
    linear, config = linear_sizes(model.module), model.module.config
    attention = 2 * T * config.hidden_size * config.num_hidden_layers
    blocks = config.num_hidden_layers
    first = sum(
        float(np.prod(weight_shape(m)))
        for name, m in model.module.named_modules()
        if isinstance(m, torch.nn.Linear) and ".0." in name
    )
    first += attention / blocks  # in the lowest block neither attention nor the tracked layers pass anything on
    forward = linear + attention
    return Counts(forward, linear + 2 * attention - first, 3 * linear + 3 * attention)


def layer_counts(layers: list[Layer], T: float, M: float, N: float, Q: int, R: int) -> dict[str, float]:
    """Per token, over the tracked layers, what each pass adds to forward and backward."""
    covariance = sum(x.O**2 + (x.I**2 if x.A_of == x.name else 0) for x in layers)
    tokens = sum(x.I**2 + x.O**2 + x.O * x.I for x in layers)
    correction = sum(min(x.I**2 + x.O**2 + x.O * x.I, x.O * x.I + x.O * x.I * (x.I + x.O) / T) for x in layers)
    orders = choose_orders(layers, int(M), int(N), Q, R)
    score = sum(getattr(count(x.O, x.I, int(M), int(N), Q, R), orders[x.name]) / M for x in layers)
    return {"covariance": covariance, "correction": min(tokens, correction), "score": score}


def main():
    demo = resources.files("upriver") / "demo"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo / "speech-model"))
    parser.add_argument("--corpus", default=str(demo / "speeches.jsonl.xz"))
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    model = up.load_model(args.model)
    corpus = up.Corpus.read(args.corpus, model.tokenizer, seq_len=args.seq_len)
    batches = corpus.plan(args.batch_tokens, corpus.sample(args.tokens, 0))
    layers = tracked_layers(model, corpus, "mlp")
    with tempfile.TemporaryDirectory() as folder:
        factors = up.fit(model, corpus, Path(folder) / "factors", max_tokens=8192)
        moments = {x.name: factors.moments(x.name) for x in layers}
    M = float(np.mean([corpus.lengths_N[rows].sum() for rows in batches]))
    N = float(np.mean([len(rows) for rows in batches]))
    orders = choose_orders(layers, int(M), int(N), args.queries, args.rank)
    random = {
        x.name: LowRank(torch.randn(args.queries, x.O, args.rank), torch.randn(args.queries, args.rank, x.I))
        for x in layers
    }
    like = torch.empty(0, dtype=model.dtype)

    def step():
        training_pass(model, corpus, batches)

    def run(consumer, stream=None):
        sweep(model, layers, corpus, batches, consumer, Labels(0, stream))

    passes = {
        "covariance": lambda: run(Covariance(torch.float32), COVARIANCE_STREAM),
        "correction": lambda: run(Correction(torch.float32, moments), CORRECTION_STREAM),
        "score": lambda: run(
            Score({x.name: route(orders[x.name], random[x.name], like) for x in layers}, args.queries, False)
        ),
    }
    step()  # warm up
    ratios: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(args.repeats):
        for name, work in passes.items():
            plain = timed(step)
            ratios[name].append(timed(work) / plain)

    T = M / N
    counts, extra = model_counts(model, layers, T), layer_counts(layers, T, M, N, args.queries, args.rank)
    print(f"{args.queries} queries at rank {args.rank}, {int(M)} tokens a batch, {torch.get_num_threads()} threads;")
    print("in plain training steps over the same tokens:\n")
    print("| pass | counted limit | reached | share of the limit |\n|---|---|---|---|")
    for name in passes:
        limit = (counts.forward + counts.backward + extra[name]) / counts.step
        reached = statistics.median(ratios[name])
        print(f"| {name} | {limit:.2f} | {reached:.2f} | {limit / reached:.0%} |")


if __name__ == "__main__":
    main()
