"""Speed and memory against an earlier commit, in alternation, in one run.

    git worktree add /tmp/before fdbafaa
    python benchmarks/before_after.py /tmp/before [--jobs demo,neox] [--queries 8,64,256] [--repeats 3] [--dtype bfloat16]
                                              [--max-tokens N] [--cold]

Fit, and trace with 8, 64 and 256 questions, of the demo and of a random GPT-NeoX type (benchmarks/plan.py), with sampled labels;
each command is a process of its own on the sources of its side.  Figures are ratios, new over old, of medians: the passes as the
manifests tell them, the whole process, and its peak resident memory.  The new side runs with `--held-out 0`: the old one judged
no solutions.  Each side traces by its own factors; the last column is the correlation of their scores, of the worst question.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from command import upriver
from plan import JOBS, Case

HERE = Path(__file__).parent.parent
FIT, TRACE = ("covariance", "eigendecomposition", "correction"), ("queries", "scan", "rescore")


def questions(case: Case, count: int, place: Path) -> Path:
    """The job's own questions, and as many more with prompts cut from the corpus and the same completions."""
    import upriver as up

    model = up.load_model(case.model)
    corpus = up.Corpus.read(case.corpus, model.tokenizer, seq_len=case.seq_len)
    asked = [json.loads(line) for line in case.queries.read_text().splitlines()]
    found = []
    for i in range(count):
        query = dict(asked[i % len(asked)], id=f"q{i}")
        if i >= len(asked):
            words = corpus.text(i % len(corpus)).split()
            query["prompt"] = " ".join(words[: len(str(query["prompt"]).split())]) or query["prompt"]
        found.append(json.dumps(query) + "\n")
    place.write_text("".join(found))
    return place


class Side:
    """One commit's sources, and a folder for what it makes."""

    def __init__(self, source: Path, folder: Path, dtype: str, flags: tuple[str, ...]):
        self.source, self.folder, self.dtype, self.flags = source, folder, dtype, flags
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, verb: str, out: str, passes: tuple[str, ...], *args: Any) -> dict[str, float]:
        env = {
            "PYTHONPATH": str(self.source / "src"),
            "UPRIVER_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        ran = upriver(verb, *args, "--out", self.folder / out, "--overwrite", env=env, quiet=True)
        times = json.loads((self.folder / out / "manifest.json").read_text())["timings"]
        found = {name: float(times.get(name, 0.0)) for name in passes}
        return found | {"process": ran.seconds, "memory": float(ran.peak)}

    def fit(self, case: Case) -> dict[str, float]:
        return self.run("fit", "factors", FIT, case.model, case.corpus, "--seq-len", case.seq_len,
                        "--max-tokens", case.max_tokens, "--dtype", self.dtype)  # fmt: skip

    def trace(self, case: Case, queries: Path) -> dict[str, float]:
        return self.run("trace", "scores", TRACE, case.model, case.corpus, queries, "--factors", self.folder / "factors",
                        "--top", 2, *self.flags)  # fmt: skip


def correlation(old: Side, new: Side) -> float:
    """Of both sides' scores, of the worst question."""
    tables = [pd.read_parquet(side.folder / "scores" / "scores.parquet").sort_values("sequence") for side in (old, new)]
    names = [x for x in tables[0] if x in tables[1] and x not in ("sequence", "document", "start", "end")]
    return float(min(tables[0][x].corr(tables[1][x]) for x in names))


def compare(old: Side, new: Side, run: Any, repeats: int, warm: bool) -> dict[str, tuple[float, float]]:
    """Medians of the old side and the new one by name; ``warm``: the first of each side fills its caches and is not counted."""
    found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for turn in range(1 - warm, repeats + 1):
        for side, rows in zip((old, new), found, strict=True):
            row = run(side)
            if turn:
                rows.append(row)
    return {name: tuple(statistics.median(row[name] for row in rows) for rows in found) for name in found[0][0]}  # type: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a work tree of the earlier commit")
    parser.add_argument("--jobs", default="demo,neox")
    parser.add_argument("--queries", default="8,64,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-tokens", type=int, help="to fit on; default: the job's")
    parser.add_argument("--cold", action="store_true", help="count the first fit, which fills the caches")
    parser.add_argument("--out", type=Path, default=Path("build/before_after"))
    args = parser.parse_args()
    print(
        "| job | run | passes, s: old to new (ratio) | process | peak memory | scores |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for job in args.jobs.split(","):
        folder = args.out / job
        (folder / "job").mkdir(parents=True, exist_ok=True)
        case = JOBS[job](folder / "job")
        case = case._replace(max_tokens=args.max_tokens or case.max_tokens)
        old = Side(args.before.resolve(), folder / "old", args.dtype, ())
        sides = old, Side(HERE, folder / "new", args.dtype, ("--held-out", "0"))
        runs = {"fit": lambda side, case=case: side.fit(case)}
        for count in map(int, args.queries.split(",")):
            asked = questions(case, count, folder / "job" / f"queries-{count}.jsonl")
            runs[f"{count} questions"] = lambda side, case=case, asked=asked: side.trace(case, asked)
        for name, run in runs.items():
            rows = compare(*sides, run, args.repeats, name == "fit" and not args.cold)
            cells = {key: f"{old:.2f} to {new:.2f} ({new / max(old, 1e-9):.2f})" for key, (old, new) in rows.items()}
            memory = "{:.2f} to {:.2f} GB ({:.2f})".format(
                *(x / 1e9 for x in rows["memory"]), rows["memory"][1] / rows["memory"][0]
            )
            passes = ", ".join(f"{key} {cell}" for key, cell in cells.items() if key not in ("process", "memory"))
            same = "" if name == "fit" else f"{correlation(*sides):.6f}"
            print(f"| {job} | {name} | {passes} | {cells['process']} | {memory} | {same} |", flush=True)
    print(f"medians of {args.repeats}", file=sys.stderr)


if __name__ == "__main__":
    main()
