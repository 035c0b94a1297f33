"""Ours against Kronfluence and Bergson: the same job on every side, phase by phase, in alternation in one run.

    python benchmarks/peers/run.py                                            the GPT-NeoX job, float32
    python benchmarks/peers/run.py --job smollm2 --queries 8 --ranks 32
    python benchmarks/peers/run.py --dtype bfloat16 --sides kronfluence
    python benchmarks/peers/run.py --as-they-come --sides kronfluence         its defaults, instead of tuned
    python benchmarks/peers/run.py --sequences 4 --tokens 32 --width 64 --layers 2 --queries 2 --repeats 1     (a try)

Builds an environment for each peer under build/peers-venv the first time.  Every side is a process of its own with the
same torch, threads and batches; while one works the others sleep.  What is compared, and with which settings: README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from environments import python_of
from job import Job
from results import ALIKE, Asked, Results, print_all

HERE, BUILD = Path(__file__).parent, Path(__file__).parents[2] / "build"
SIZES = {"neox": (64, 256, 6), "smollm2": (64, 128, 0)}  # sequences, tokens, layers (0: all)


class Worker:
    """The process of one side."""

    def __init__(self, side: str, python: Path, job: Job):
        self.side, self.log = side, Path(job.folder) / f"{side}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(python), str(HERE / "worker.py"), side, str(Path(job.folder) / "job.json")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(side, job),
            )  # fmt: skip
        self.about = self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        reply = self._read()
        took = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in reply["seconds"].items())
        print(f"{self.side}: {' '.join(map(str, command.values()))}: {took}", file=sys.stderr)
        return reply

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.side} ended with status {self.process.wait()}:\n" + self.log.read_text()[-4000:])
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(side: str, job: Job) -> dict[str, str]:
    """As many threads for every side.  Those of ours that wait soon sleep, as `import upriver` before torch has it; the peers
    do not say, and are faster as they are: the eigendecompositions of torch take half as long again with sleeping threads."""
    threads = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    ours = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "30000", "OPENBLAS_THREAD_TIMEOUT": "4"}
    waiting = ours if side == "ours" else {}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **waiting, **offline}


def make_job(args: argparse.Namespace, folder: str) -> Job:
    sizes = zip(("sequences", "tokens", "layers"), SIZES[args.job], strict=True)
    given: dict[str, Any] = {
        name: usual if getattr(args, name) is None else getattr(args, name) for name, usual in sizes
    }
    names = (
        "query_tokens",
        "width",
        "vocabulary",
        "batch",
        "query_batch",
        "dtype",
        "fisher",
        "threads",
        "memory",
        "as_they_come",
    )
    given |= {name: getattr(args, name) for name in names}
    job = Job(folder=folder, kind=args.job, queries=max(args.queries), **given)
    subprocess.run([sys.executable, str(HERE / "job.py"), json.dumps(asdict(job))], check=True)
    job.write()
    return job


def measure(args: argparse.Namespace, workers: dict[str, Worker], dense: int) -> Results:
    """All repeats; the order of the sides turns round from one to the next.  ``dense``: bytes of a query at full rank."""
    results, ours = Results(list(workers)), workers["ours"]
    wanted = [Asked(queries, rank) for queries in args.queries for rank in args.ranks]
    for repeat in range(args.repeats):
        order = list(workers)[:: -1 if repeat % 2 else 1]
        results.step(ours.ask(do="step"))
        for side in order:
            results.fit(side, workers[side].ask(do="fit"))
        for asked in wanted:
            for side in order:
                score(results, workers[side], asked, asked.queries * dense <= args.query_memory * 1e9)
    few = Asked(min(args.queries), None)  # compared in every run, in whatever is timed
    for side, worker in workers.items():
        if (few, side) not in results.scores_NQ and few.queries * dense <= args.query_memory * 1e9:
            reply = worker.ask(do="score", queries=few.queries, rank=None)
            results.scores_NQ[few, side] = np.load(reply["scores"])
    if args.dtype != "float32":
        for queries in args.queries:
            if queries * dense <= args.query_memory * 1e9:
                results.reference_NQ[queries] = np.load(ours.ask(do="reference", queries=queries)["scores"])
    return results


def score(results: Results, worker: Worker, asked: Asked, fits: bool) -> None:
    """One scoring; Bergson has full rank only, so its one figure stands beside every rank."""
    whole = asked.rank is None or worker.side == "bergson"
    if whole and not fits:
        print(f"{worker.side}: {asked}: not run, its queries at full rank pass --query-memory", file=sys.stderr)
        return
    rank = None if whole else asked.rank
    results.score(asked, worker.side, worker.ask(do="score", queries=asked.queries, rank=rank))


def rank_of(text: str) -> int | None:
    return None if text == "full" else int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(SIZES), default="neox")
    parser.add_argument("--queries", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--ranks", type=rank_of, nargs="+", default=[None, 32], help="numbers, or full")
    parser.add_argument("--dtype", choices=["float32", "mixed", "bfloat16"], default="float32")
    parser.add_argument("--fisher", choices=["empirical", "sampled"], default="empirical", help="sampled: not Bergson")
    parser.add_argument("--sides", nargs="+", choices=["kronfluence", "bergson"], default=["kronfluence", "bergson"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, help="default: 64")
    parser.add_argument("--tokens", type=int, help="of a sequence; default: 256 (neox), 128 (smollm2)")
    parser.add_argument("--query-tokens", type=int, default=32, help="of prompt and completion, half each")
    parser.add_argument(
        "--batch", type=int, default=16, help="sequences in a batch, of the peers and of the plain step"
    )
    parser.add_argument("--query-batch", type=int, default=16, help="queries in a batch of Kronfluence")
    parser.add_argument("--width", type=int, default=512, help="of the neox job")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the neox job")
    parser.add_argument("--layers", type=int, help="default: 6 (neox), all 30 (smollm2; a number takes the first few)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--query-memory", type=float, default=8.0, help="GB of full-rank queries beyond which none are made"
    )
    parser.add_argument("--memory", help="the limit that ours is given, such as 2GB; default: 80 %% of what is free")
    parser.add_argument(
        "--as-they-come", action="store_true", help="the peers with their own defaults, instead of tuned (README.md)"
    )
    parser.add_argument("--venvs", type=Path, default=BUILD / "peers-venv")
    args = parser.parse_args()
    if args.fisher == "sampled" and "bergson" in args.sides:
        parser.error("labels drawn from the model are compared with Kronfluence's only: give --sides kronfluence")
    return args


def main() -> None:
    args = parse()
    BUILD.mkdir(exist_ok=True)
    pythons = {side: python_of(side, args.venvs) for side in ("ours", *args.sides)}
    with tempfile.TemporaryDirectory(prefix="peers-", dir=BUILD) as folder:
        job = make_job(args, folder)
        workers = {side: Worker(side, python, job) for side, python in pythons.items()}
        results = measure(args, workers, 4 * int((Path(folder) / "weights.txt").read_text()))
        for worker in workers.values():
            worker.close()
    about = {side: worker.about for side, worker in workers.items()}
    model = f"{job.width} wide, {job.layers} layers, vocabulary {job.vocabulary:,}" if job.kind == "neox" else "135M"
    print(
        f"{job.kind} ({model}); {job.sequences} sequences of {job.tokens} tokens; queries of {job.query_tokens}; {job.dtype}, "
        f"{job.fisher} Fisher"
    )
    print(f"{job.threads} threads, torch {about['ours']['torch']}, median of {args.repeats}\n")
    print("\n".join(f"* {side}: {found['settings']}; torch {found['torch']}" for side, found in about.items()))
    print_all(results, {side: found["idle"] for side, found in about.items()})
    if args.dtype == "float32" and args.fisher == "empirical":
        found = [alike(results, side) for side in args.sides]  # each is printed
        sys.exit(0 if all(found) else 1)


def alike(results: Results, side: str) -> bool:
    """Whether the scores of a side agree with ours at full rank; without any to compare they do not."""
    worst = results.worst(side)
    good = worst is not None and worst >= ALIKE
    found = "none to compare" if worst is None else f"{worst:.8f}"
    print(f"\nPearson with {side} at full rank, lowest: {found} ({'ok' if good else 'FAILED'})")
    return good


if __name__ == "__main__":
    main()
