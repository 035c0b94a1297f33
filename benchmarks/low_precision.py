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


def scan(job: Job, solved: list[Path], rows: np.ndarray) -> np.ndarray:
    """Scores ``[N, Q]``, in the order of the rows."""
    routes, hold = plan_routes(job, solved, list(range(len(job.layers))))
    consumer = Score(routes, len(job.queries), False, hold)
    source = Source.of(job.data, rows, job.division.batch_tokens)
    sweep(job.model, job.layers, source, rows, consumer)
    return consumer.result()["scores"].numpy()


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
        # models of their own: weights are converted in place
        up.load_model(args.model).computing_in("bfloat16") as rough,
        up.load_model(args.model).computing_in("mixed") as mixed,
    ):
        place = args.factors or Path(folder) / "factors"
        factors = up.Factors(place) if args.factors else up.fit(model, corpus, place, max_tokens=args.fit_tokens)
        queries = queries.bound(model.tokenizer)
        rows = corpus.sample(args.tokens, 0)
        stage = Artifact.open(Path(folder) / "scores", "bench", {})
        jobs = {}
        for name, m in (("float32", model), ("mixed", mixed), ("bfloat16", rough)):
            layers = tracked_layers(m, corpus, factors.options.layers)
            opts = TraceOptions(dtype=name, layers=factors.options.layers, seed=0)
            own = tracked_layers(model, corpus, factors.options.layers)
            division = divide(Given(model, corpus, queries, factors, opts, (), silent, mute), own, None)
            jobs[name] = Job(
                stage, m, layers, corpus, queries, factors, rows, opts, silent, division, factors.curvature()
            )
        solved = solve(jobs["float32"])
        scores, seconds = {}, {name: [] for name in jobs}
        for repeat in range(args.repeats + 1):
            for name, job in jobs.items():

                def work(name: str = name, job: Job = job, part: np.ndarray = rows if repeat else rows[:16]) -> None:
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
