"""Kill ``upriver fit`` and ``upriver trace`` with SIGKILL at random moments, and compare with a run that was left alone.

    python tests/kill_resume.py [--kills 20] [--seed 0] [--model FOLDER] [--corpus FILE] [--queries FILE] [--tokens N]

Each killed command is given again as it was, nothing cleaned up, until it ends.  Every file must then be the same bit for
bit (in the manifests: all but the timings), no file may be left over, and of each killed process at most one unit of work may
have to be done again.  The units are made small, so that many kills fall on a short run.  Exit status 0 when all of that holds.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

UNIT_TOKENS, BATCH_TOKENS, SEQ_LEN = 1536, 512, 64
DEMO = Path(__file__).parent.parent / "src" / "upriver" / "demo"
SHIPPED = {k: DEMO / str(v) for k, v in tomllib.loads((DEMO / "run.toml").read_text()).items()}


class Start(NamedTuple):
    """A unit of work that a process began: what it was, and when."""

    unit: str
    at: float


class Moment(NamedTuple):
    """When to kill: so many seconds after so many units of work were begun (none: after the process began)."""

    units: int
    seconds: float


class Killed(NamedTuple):
    """One kill: the command, how long it had run, and what it had begun."""

    verb: str
    seconds: float
    at: float
    starts: list[Start]


def child(log: Path, args: list[str]) -> None:
    """Be ``upriver ARGS`` with small units, and note in ``log`` each unit of work that is begun."""
    from upriver import cli, pipeline
    from upriver.curvature import fit
    from upriver.influence import stages
    from upriver.model import sweep
    from upriver.runtime.artifact import digest
    from upriver.text import corpus

    sweep.UNIT_TOKENS = stages.UNIT_TOKENS = UNIT_TOKENS
    sink = log.open("a")

    def noted(what: str, work: Callable, name: Callable[..., Any]) -> Callable:
        def run(*given: Any, **named: Any) -> Any:
            print(json.dumps([f"{what} {name(*given)}", time.time()]), file=sink, flush=True)
            return work(*given, **named)

        return run

    def rows(model: Any, layers: Any, data: Any, batches: Any, consumer: Any, *rest: Any) -> str:
        return f"{type(consumer).__name__} {digest([r.tolist() for r in batches])}"

    corpus.build = noted("corpus", corpus.build, lambda *given: "")
    fit.sweep = noted("pass", fit.sweep, rows)
    fit.decomposed = noted("eigen", fit.decomposed, lambda layer, *rest: layer.name)
    stages._solved = noted("solve", stages._solved, lambda job, chunk: chunk)
    stages.sweep = noted("pass", stages.sweep, rows)
    stages._rescored = noted("rescore", stages._rescored, lambda job, chunk, wanted: chunk)
    pipeline.write_scores = noted("tables", pipeline.write_scores, lambda *given: "")
    sys.argv = ["upriver", *args]
    cli.main()


def begun(log: Path) -> list[Start]:
    if not log.exists():
        return []
    return [Start(*json.loads(line)) for line in log.read_text().splitlines() if line.endswith("]")]


class Trial:
    """The two commands in a folder of their own."""

    def __init__(self, folder: Path, opts: argparse.Namespace, corpus: Path):
        self.folder, self.runs = folder, 0
        common = [opts.model, str(corpus)]
        factors, scores = str(folder / "factors"), str(folder / "scores")
        self.commands = {
            "fit": ["fit", *common, "--out", factors, "--seq-len", str(SEQ_LEN), "--max-tokens", str(opts.tokens // 2),
                    "--batch-tokens", str(BATCH_TOKENS)],
            "trace": ["trace", *common, opts.queries, "--factors", factors, "--out", scores, "--top", "5"],
        }  # fmt: skip

    def start(self, verb: str) -> tuple[subprocess.Popen, Path]:
        self.runs += 1
        log = self.folder / f"run-{self.runs:03d}.log"
        env = os.environ | {"OMP_NUM_THREADS": "1", "UPRIVER_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        args = [sys.executable, __file__, "--child", str(log), *self.commands[verb]]
        return subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), log

    def finish(self, verb: str) -> tuple[float, float, list[Start]]:
        """Run to the end; returns the seconds before the first unit and after it, and the units."""
        started = time.time()
        process, log = self.start(verb)
        complaint = process.communicate()[1]
        assert process.returncode == 0, complaint
        starts = begun(log)
        return starts[0].at - started, time.time() - starts[0].at, starts

    def files(self) -> dict[str, bytes]:
        """Every result by its name; manifests without what a clock or the folder's own name decides."""
        found = {}
        for path in sorted(p for name in ("factors", "scores") for p in (self.folder / name).rglob("*") if p.is_file()):
            content = path.read_bytes()
            if path.name == "manifest.json":
                content = json.dumps(
                    {k: v for k, v in json.loads(content).items() if k not in ("timings", "digest")}
                ).encode()
            if path.name != ".lock":
                found[str(path.relative_to(self.folder))] = content
        return found


def interrupted(trial: Trial, moments: Iterator[Moment], kills: int) -> Iterator[Killed | list[Start]]:
    """Run both commands to their end with at most ``kills`` kills; yields each kill, and the units of each run that ended."""
    for verb in trial.commands:
        while True:
            started = time.time()
            process, log = trial.start(verb)
            if kills:
                kill_at(next(moments), process, log)
            complaint = process.communicate()[1]
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, complaint
                yield begun(log)
                break
            kills -= 1
            yield Killed(verb, time.time() - started, time.time(), begun(log))


def kill_at(moment: Moment, process: subprocess.Popen, log: Path) -> None:
    """Wait for the moment and kill, unless the process ends before it."""
    while process.poll() is None and len(begun(log)) < moment.units:
        time.sleep(0.005)
    try:
        process.wait(moment.seconds)
    except subprocess.TimeoutExpired:
        process.kill()


def random_moments(rng: random.Random, units: int, kills: int, loading: float, working: float) -> Iterator[Moment]:
    """Moments that spread ``kills`` kills over a run of ``units`` units, some of them before the first."""
    while True:
        begun_units = rng.randint(0, 2 * units // kills)
        yield Moment(begun_units, rng.uniform(0, 1.5 * working / units if begun_units else loading))


def lost(events: list[Killed | list[Start]]) -> list[list[Start]]:
    """For each kill the units that the process had begun and that a later one had to begin again."""
    out = []
    for i, event in enumerate(events):
        if isinstance(event, Killed):
            later = {s.unit for e in events[i + 1 :] for s in (e.starts if isinstance(e, Killed) else e)}
            out.append([s for s in event.starts if s.unit in later])
    return out


def report(number: int, killed: Killed, again: list[Start]) -> None:
    doing = killed.starts[-1].unit.rsplit(" ", 1)[0] if killed.starts else "loading"
    seconds = killed.at - again[0].at if again else 0.0
    print(
        f"kill {number:2d}: {killed.verb:5s} after {killed.seconds:5.1f} s, {len(killed.starts):3d} units begun, "
        f"last {doing:16s} lost {len(again)} units, {seconds:.2f} s",
        flush=True,
    )


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
    alone = Trial(folder / "alone", opts, corpus)
    alone.folder.mkdir()
    measured = [alone.finish(verb) for verb in alone.commands]
    loading, working = min(m[0] for m in measured), sum(m[1] for m in measured)
    units = {s.unit for m in measured for s in m[2]}
    print(f"left alone: {len(units)} units in {working:.1f} s, and {loading:.1f} s of loading before each command")
    moments = random_moments(random.Random(opts.seed), len(units), opts.kills, loading, working)
    number, good, expected = 0, True, alone.files()
    while number < opts.kills:
        trial = Trial(folder / f"killed-{number}", opts, corpus)
        trial.folder.mkdir()
        events = list(interrupted(trial, moments, opts.kills - number))
        kills = [e for e in events if isinstance(e, Killed)]
        for killed, again in zip(kills, lost(events), strict=True):
            number += 1
            good &= len(again) <= 1
            report(number, killed, again)
        other = differences(expected, trial.files())
        good &= not other and bool(kills)
        print(f"{len(expected)} files compared after {len(kills)} kills: {other or 'the same bit for bit'}")
    return good


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]), sys.argv[3:])
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
