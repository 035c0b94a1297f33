"""How long idle threads of torch wait for work before they sleep: the same pass in processes that differ in that alone.

    python benchmarks/waiting.py [--counts 0 30000 300000] [--repeats 7] [--tokens 8192]

A number is ``GOMP_SPINCOUNT``: how often a thread of libgomp looks for work; 0 sleeps at once, 300000 is the library's own.  Each
line is a pass over the demo's corpus that forms second moments, whose products go by torch and by SciPy's BLAS, and the median of
its time over that of the first process, in alternation.
"""

import argparse
import os
import statistics
import subprocess
import sys
from importlib import resources

DTYPES = ("float32", "bfloat16")


def worker(tokens: int) -> None:
    """Read a type from standard input, make a pass in it, print its seconds."""
    import torch
    from scan import timed

    import upriver as up
    from upriver.curvature.consumers import Covariance
    from upriver.model.check import tracked_layers
    from upriver.model.sweep import Source, sweep
    from upriver.runtime.system import settle_memory

    settle_memory(reuse=True)  # as a pass does where the memory allows
    demo = resources.files("upriver") / "demo"
    model = up.load_model(str(demo / "speech-model"))
    corpus = up.Corpus.read(str(demo / "speeches.jsonl.xz"), model.tokenizer, seq_len=128)
    source = Source.of(corpus, corpus.sample(tokens, 0), 2048)

    def covariances(dtype: str) -> float:
        with model.computing_in(dtype) as computing:
            layers = tracked_layers(computing, corpus, "mlp")
            return timed(lambda: sweep(computing, layers, source, source.rows, Covariance({}, torch.float32)))

    for line in sys.stdin:
        print(covariances(line.strip()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", default=["0", "30000", "300000"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.tokens)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    command = [sys.executable, __file__, "--worker", "--tokens", str(args.tokens)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": count},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for count in args.counts
    ]

    def once(process: subprocess.Popen, dtype: str) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        print(dtype, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    print("| covariance pass in | " + " | ".join(args.counts) + " |\n|" + "---|" * (1 + len(args.counts)))
    for dtype in DTYPES:
        seconds = [[once(p, dtype) for p in processes] for _ in range(args.repeats + 1)][1:]  # the first warms up
        ratios = (statistics.median(s[i] / s[0] for s in seconds) for i in range(len(processes)))
        print(f"| {dtype} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |", flush=True)
    for process in processes:
        process.communicate()


if __name__ == "__main__":
    main()
