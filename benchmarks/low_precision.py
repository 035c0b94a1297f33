"""The scan in bfloat16 and in mixed precision against the scan in float32: speed in one run, and how far the scores agree.

    python benchmarks/low_precision.py                                                       the demo
    python benchmarks/low_precision.py --model FILE.gguf --corpus passages.jsonl --queries queries.jsonl --seq-len 160

The same factors and solved queries (float32) and the same batches for both, in alternation; the median of the ratios counts.
"""

import argparse
import statistics
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from scan import timed

import upriver as up
from upriver.influence.score import Score
from upriver.influence.stages import Job, divide, plan_routes, solve_stage
from upriver.model.sweep import Labels, sweep, tracked_layers
from upriver.runtime.artifact import Artifact
from upriver.runtime.config import TraceOptions
from upriver.runtime.progress import silent


def scan(job: Job, solved: list[Path], batches: list[np.ndarray]) -> np.ndarray:
    """Scores ``[N, Q]``, by corpus row."""
    routes, hold = plan_routes(job, solved, batches)
    consumer = Score(routes, len(job.queries), False, hold)
    sweep(job.model, job.layers, job.data, batches, consumer, Labels())
    found = consumer.tensors()
    return found["scores"][torch.argsort(found["rows"])].numpy()


def main() -> None:
    demo = resources.files("upriver") / "demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo / "speech-model"))
    parser.add_argument("--corpus", default=str(demo / "speeches.jsonl.xz"))
    parser.add_argument("--queries", default=str(demo / "queries.jsonl"))
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--factors", type=Path, help="fitted already; made in a folder that is removed, if not given")
    parser.add_argument("--fit-tokens", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = up.load_model(args.model)
    corpus = up.Corpus.read(args.corpus, model.tokenizer, seq_len=args.seq_len)
    queries = up.Queries.read(args.queries, model.tokenizer, complete=1)
    if queries.needs_completion:
        queries = up.complete(model, queries, 8)
    with (
        tempfile.TemporaryDirectory() as folder,
        model.computing_in("bfloat16") as rough,
        model.computing_in("mixed") as mixed,
    ):
        place = args.factors or Path(folder) / "factors"
        factors = up.Factors(place) if args.factors else up.fit(model, corpus, place, max_tokens=args.fit_tokens)
        opts, rows = TraceOptions(), corpus.sample(args.tokens, 0)
        stage = Artifact.open(Path(folder) / "scores", "bench", {})
        jobs = {}
        for name, m in (("float32", model), ("mixed", mixed), ("bfloat16", rough)):
            layers = tracked_layers(m, corpus, factors.options.layers)
            split = divide(model, layers, corpus, queries, opts, name)
            jobs[name] = Job(stage, m, layers, corpus, queries, factors, rows, opts, silent, split)
        solved, batches = solve_stage(jobs["float32"]), corpus.plan(opts.batch_tokens, rows)
        scores, seconds = {}, {name: [] for name in jobs}
        for repeat in range(args.repeats + 1):
            for name, job in jobs.items():

                def work(name: str = name, job: Job = job, part: list = batches if repeat else batches[:1]) -> None:
                    scores[name] = scan(job, solved, part)

                taken = timed(work)
                if repeat:  # the first round warms up
                    seconds[name].append(taken)
    tokens = int(corpus.lengths_N[rows].sum())
    print(f"{Path(args.model).name}: {len(queries)} queries, {tokens:,} tokens, {torch.get_num_threads()} threads")
    for name in ("mixed", "bfloat16"):
        ratio = statistics.median(a / b for a, b in zip(seconds["float32"], seconds[name], strict=True))
        pearson = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores["float32"].T, scores[name].T, strict=True)]
        print(f"{name} is {ratio:.2f} times as fast as float32 (median of {args.repeats})")
        print(
            f"correlation of its scores with those of float32: {np.mean(pearson):.6f}, worst query {min(pearson):.6f}"
        )


if __name__ == "__main__":
    main()
