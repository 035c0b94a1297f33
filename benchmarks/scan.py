"""Speed of the trace's scan against a plain training step of the same model, in one run.

    python benchmarks/scan.py [--model FOLDER --corpus FILE --queries FILE] [--repeats 3] [--tokens 65536]

Both go over the same batches with the same threads, in alternation; the numbers are tokens per second, and their ratio
is what counts: 1.0 means that scoring a token costs what a forward and backward pass over it costs.
"""

import argparse
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch

import upriver as up
from upriver.influence.forecast import divide
from upriver.influence.job import Given, Job
from upriver.influence.scan import plan_routes
from upriver.influence.score import Score
from upriver.influence.solve import solve
from upriver.model.check import tracked_layers
from upriver.model.sweep import Source, sweep
from upriver.runtime.artifact import Artifact
from upriver.runtime.config import TraceOptions
from upriver.runtime.progress import mute, silent


def training_pass(model, corpus, batches):
    """A plain forward and full backward pass, every parameter with a gradient, as a training step does it."""
    model.module.train()
    for rows in batches:
        tokens = corpus.batch(rows).inputs["tokens"]
        model.module(input_ids=tokens, labels=tokens).loss.backward()
        model.module.zero_grad(set_to_none=True)
    model.module.eval()


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(job, batches, repeats):
    routes, hold = plan_routes(job, solve(job), list(range(len(job.layers))))
    source = Source.of(job.data, job.rows, job.division.batch_tokens)

    def scan():
        sweep(job.model, job.layers, source, job.rows, Score(routes, len(job.queries), False, hold))

    scan(), training_pass(job.model, job.data, batches[:2])  # warm up
    return [(timed(scan), timed(lambda: training_pass(job.model, job.data, batches))) for _ in range(repeats)]


def main():
    demo = resources.files("upriver") / "demo"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo / "speech-model"))
    parser.add_argument("--corpus", default=str(demo / "speeches.jsonl.xz"))
    parser.add_argument("--queries", default=str(demo / "queries.jsonl"))
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65_536)
    args = parser.parse_args()
    model = up.load_model(args.model)
    corpus = up.Corpus.read(args.corpus, model.tokenizer, seq_len=args.seq_len)
    queries = up.Queries.read(args.queries, model.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        factors = up.fit(model, corpus, Path(folder) / "factors", max_tokens=16_384)
        opts = TraceOptions(dtype="float32", layers="mlp", seed=0)
        rows = corpus.sample(args.tokens, 0)
        stage = Artifact.open(Path(folder) / "scores", "bench", {})
        layers = tracked_layers(model, corpus, "mlp")
        queries = queries.bound(model.tokenizer)
        division = divide(Given(model, corpus, queries, factors, opts, (), silent, mute), layers, None)
        batches = corpus.plan(division.batch_tokens, rows)
        job = Job(stage, model, layers, corpus, queries, factors, rows, opts, silent, division, factors.curvature())
        times = compare(job, batches, args.repeats)
    tokens = int(corpus.lengths_N[rows].sum())
    ratio = statistics.median(plain / scan for scan, plain in times)
    scan, plain = (statistics.median(t[i] for t in times) for i in (0, 1))
    print(f"{len(queries)} queries, {tokens:,} tokens, {torch.get_num_threads()} threads, median of {args.repeats}")
    print(f"plain forward and backward  {tokens / plain:8,.0f} tokens/s")
    print(f"scan of the trace           {tokens / scan:8,.0f} tokens/s")
    print(f"ratio                       {ratio:8.2f}")


if __name__ == "__main__":
    main()
