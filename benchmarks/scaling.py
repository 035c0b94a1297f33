"""Time and memory of fit and trace on a corpus of 1, 2, 4 and 8 times as many sequences: a straight line and a level one.

    python benchmarks/scaling.py [--tokens 32768] [--sizes 1,2,4,8] [--repeats 1] [--memory 2GB]

Each command is a process of its own, on the demo's model and passages of its speeches.  Seconds are those of the passes over
the corpus, as the manifests tell them (start-up, loading and tokenising are not in them); the line is the least-squares one of
relative errors through all sizes; memory is the peak resident set of the process.  With repeats, the median.
"""

import argparse
import json
import lzma
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from command import upriver
from transformers import AutoTokenizer

DEMO = Path(str(resources.files("upriver") / "demo"))
PASSES = {"fit": ("covariance", "correction"), "trace": ("scan",)}
ALLOWED = 0.05


def passages(length: int) -> Iterator[str]:
    """Passages of ``length`` tokens of the demo's speeches, without end; the second time round they begin elsewhere."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "speech-model")
    with lzma.open(DEMO / "speeches.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    found = [tokenizer(t, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"] for t in texts]
    start = 0
    while True:
        for text, offsets in zip(texts, found, strict=True):
            for first in range(start, len(offsets) - length, length):
                yield text[offsets[first][0] : offsets[first + length - 1][1]]
        start += 7


def write_corpora(folder: Path, sizes: list[int], count: int, length: int) -> dict[int, Path]:
    """A file of ``size * count`` passages for each size; the larger ones begin with the smaller ones."""
    source = passages(length)
    lines = [json.dumps({"id": str(n), "text": next(source)}) + "\n" for n in range(max(sizes) * count)]
    files = {size: folder / f"corpus-{size}.jsonl" for size in sizes}
    for size, file in files.items():
        file.write_text("".join(lines[: size * count]), encoding="utf-8")
    return files


def run(folder: Path, *args: object) -> float:
    """Run the command line in a process of its own; its peak resident memory in MB."""
    env = {"UPRIVER_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return upriver(*args, env=env, quiet=True).peak / 1e6


def measure(folder: Path, corpus: Path, opts: argparse.Namespace) -> dict[str, float]:
    """Seconds of each pass, peak memory of each command, and what was read, for one corpus."""
    factors, scores = folder / "factors", folder / "scores"
    bound = ["--memory", opts.memory] if opts.memory else []
    model = DEMO / "speech-model"
    out = {
        "fit": run(
            folder, "fit", model, corpus, "--out", factors, "--seq-len", 2 * opts.length, "--max-tokens", 10**9,
            "--batch-tokens", opts.batch_tokens, "--overwrite", *bound,
        ),
        "trace": run(
            folder, "trace", model, corpus, DEMO / "queries.jsonl", "--factors", factors, "--out", scores,
            "--top", 10, "--overwrite", *bound,
        ),
    }  # fmt: skip
    for verb, place in (("fit", factors), ("trace", scores)):
        timings = json.loads((place / "manifest.json").read_text())["timings"]
        out |= {name: timings[name] for name in PASSES[verb]}
    return out | {"tokens": timings["scan_tokens"]}


def deviations(x: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """How far each time lies from the line through all of them, as a share of the time."""
    slope, start = np.polyfit(x, seconds, 1, w=1 / seconds)
    return seconds / (start + slope * x) - 1


def table(sizes: list[int], count: int, found: list[dict[str, float]]) -> list[str]:
    columns = {name: np.array([row[name] for row in found]) for name in found[0]}
    names = [name for verb in PASSES.values() for name in verb]
    lines = {name: deviations(columns["tokens"], columns[name]) for name in names}
    levels = {verb: columns[verb] / columns[verb][0] - 1 for verb in PASSES}
    out = [
        "| size | sequences | tokens | " + " | ".join(f"{n}, s (from the line)" for n in names)
        + " | " + " | ".join(f"peak of {verb}, MB (from the first)" for verb in PASSES) + " |",
        "|" + "---|" * (3 + len(names) + len(PASSES)),
    ]  # fmt: skip
    for i, size in enumerate(sizes):
        cells = [f"{columns[n][i]:.2f} ({lines[n][i]:+.1%})" for n in names]
        cells += [f"{columns[verb][i]:.0f} ({levels[verb][i]:+.1%})" for verb in PASSES]
        out.append(f"| {size}x | {size * count:,} | {columns['tokens'][i]:,.0f} | " + " | ".join(cells) + " |")
    worst_time, worst_memory = (max(float(np.abs(v).max()) for v in x.values()) for x in (lines, levels))
    verdict = "good" if max(worst_time, worst_memory) <= ALLOWED else "NOT GOOD"
    return [
        *out,
        "",
        f"{verdict}: at most {worst_time:.1%} from the line, memory at most {worst_memory:.1%} from the first",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the corpus of size 1")
    parser.add_argument("--sizes", default="1,2,4,8")
    parser.add_argument("--length", type=int, default=128, help="tokens of a passage")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory", help="the promise given to both commands, such as 2GB")
    opts = parser.parse_args()
    sizes, count = [int(size) for size in opts.sizes.split(",")], opts.tokens // opts.length
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = write_corpora(folder, sizes, count, opts.length)
        runs: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
        for _ in range(opts.repeats):
            for size in sizes:
                runs[size].append(measure(folder, corpora[size], opts))
                print(f"{size}x: {runs[size][-1]}", file=sys.stderr, flush=True)
    found = [{key: statistics.median(r[key] for r in runs[size]) for key in runs[size][0]} for size in sizes]
    print("\n".join(table(sizes, count, found)))


if __name__ == "__main__":
    main()
