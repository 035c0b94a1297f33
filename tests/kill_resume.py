"""Kill ``upriver run`` with SIGKILL and SIGTERM at random moments, and compare with a run that was left alone.

    python tests/kill_resume.py [--kills 20] [--seed 0] [--tokens 24000] [--corpus FILE] [--queries FILE] [--model FOLDER]

The command is given again as it was, nothing cleaned up, until it ends, and then into a new folder until there were enough
kills.  Every file of factors and scores must be the same bit for bit (in the manifests: all but the timings), and no file may
be left over.  A process that is asked to stop by SIGTERM must end with status 75 and a sentence.  The units are made small, so
that many kills fall on a short run.  Exit status 0 when all of that holds.
"""

import argparse
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

UNIT_TOKENS, BATCH_TOKENS, SEQ_LEN = 1536, 512, 64
STOPPED = 75
DEMO = Path(__file__).parent.parent / "src" / "upriver" / "demo"
SHIPPED = {k: DEMO / str(v) for k, v in tomllib.loads((DEMO / "run.toml").read_text()).items()}


class Trial:
    """The command in a folder of its own."""

    def __init__(self, folder: Path, opts: argparse.Namespace, corpus: Path):
        folder.mkdir()
        self.folder, self.file, self.kills = folder, folder / "run.toml", 0
        values = {
            "model": opts.model, "corpus": str(corpus), "queries": opts.queries, "out": str(folder / "out"), "top": 5,
            "seq_len": SEQ_LEN, "max_tokens": opts.tokens // 2, "batch_tokens": BATCH_TOKENS, "unit_tokens": UNIT_TOKENS,
            "held_out": 2000,
        }  # fmt: skip
        self.file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))

    def run(self, seconds: float | None = None, how: signal.Signals = signal.SIGKILL) -> tuple[bool, float]:
        """Give the command once, and end it after so many seconds; whether it came to its end, and how long it took."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "UPRIVER_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        command, start = [sys.executable, "-m", "upriver.cli", "run", str(self.file)], time.time()
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            complaint = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(how)
            complaint = process.communicate()[1]
        took, status = time.time() - start, process.returncode
        if status == 0:
            return True, took
        self.kills += 1
        if how == signal.SIGKILL:
            assert status == -signal.SIGKILL, complaint
        elif status != -signal.SIGTERM:  # the libraries were still being loaded
            assert status == STOPPED, complaint
            assert "stopped; what was finished is kept" in complaint, complaint
        return False, took

    def files(self) -> dict[str, bytes]:
        """Every result by its name; manifests without what a clock decides."""
        found = {}
        places = (self.folder / "out" / name for name in ("factors", "scores"))
        for path in sorted(p for place in places for p in place.rglob("*") if p.is_file() and p.name != ".lock"):
            content = path.read_bytes()
            if path.name == "manifest.json":
                told = json.loads(content)
                content = json.dumps({k: v for k, v in told.items() if k not in ("timings", "digest")}).encode()
            found[str(path.relative_to(self.folder))] = content
        return found


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def part_of(corpus: Path, tokens: int, place: Path) -> Path:
    """Passages of the demo's speeches, spread over all of them, of about ``tokens`` tokens in total."""
    with lzma.open(corpus, "rt", encoding="utf-8") as source:
        records = [json.loads(line) for line in source]
    size = max(200, 5 * tokens // len(records))
    place.write_text("".join(json.dumps(r | {"text": r["text"][:size]}) + "\n" for r in records), encoding="utf-8")
    return place


def run(opts: argparse.Namespace, folder: Path) -> bool:
    corpus = Path(opts.corpus) if opts.corpus else part_of(SHIPPED["corpus"], opts.tokens, folder / "part.jsonl")
    alone, draw, kills, good = Trial(folder / "alone", opts, corpus), random.Random(opts.seed), 0, True
    ended, took = alone.run()
    expected = alone.files()
    print(f"left alone: {len(expected)} files in {took:.1f} s", flush=True)
    while kills < opts.kills:
        trial, ended = Trial(folder / f"killed-{kills}", opts, corpus), False
        while not ended:
            how = draw.choice([signal.SIGKILL, signal.SIGTERM])
            ended, seconds = trial.run(draw.uniform(0.2, 1.2) * took if kills + trial.kills < opts.kills else None, how)
            print(f"{'ended' if ended else how.name:8} after {seconds:5.1f} s", flush=True)
        kills += trial.kills
        other = differences(expected, trial.files())
        good &= not other
        print(
            f"{len(expected)} files compared after {trial.kills} kills: {other or 'the same bit for bit'}", flush=True
        )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(SHIPPED["model"]))
    parser.add_argument("--corpus", help="a part of the demo's speeches by default")
    parser.add_argument("--queries", default=str(SHIPPED["queries"]))
    parser.add_argument(
        "--tokens", type=int, default=24_000, help="of the part of the speeches; half of them are fitted on"
    )
    with tempfile.TemporaryDirectory() as folder:
        good = run(parser.parse_args(), Path(folder))
    print("good" if good else "NOT GOOD")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
