"""Damage every file of every artifact, run what reads it, and see that no number is wrong and nobody's file is lost.

    python tests/damage.py [--cases 300] [--seed 0] [--keep FOLDER]

Artifacts are a tokenised corpus, factors with the diagonal, scores, and fits and traces that a SIGKILL stopped.  In each case
one file of one of them is spoiled: a bit flipped, cut short, removed, swapped with its neighbour, replaced by the same file of
another run; of JSON an entry removed or given another type, or the whole sealed again as of another version.  Then the commands
that read it are run, in this process.  Each must give the very numbers of the undamaged run, or refuse with one sentence.  In
some cases somebody's file lies in the folder, and some commands are given again with ``overwrite``: it must still be there.
A table of outcomes is printed; exit status 0 when all are good.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

import upriver as up
from cli_cases import QUERIES, RECORDS, save_model
from text_cases import write_jsonl
from upriver.curvature.diagonal import fit_diagonal
from upriver.errors import UpriverError
from upriver.runtime.artifact import write_json

MINE = "mine.txt"  # a file of somebody else
Numbers = dict[str, Any]


class Run(NamedTuple):
    """One user's inputs; all artifacts of the run lie in folders of one place, under the same names for every run."""

    model: Any
    corpus: Path
    queries: Path
    seed: int

    def read(self, place: Path) -> Any:
        return up.Corpus.read(self.corpus, self.model.tokenizer, seq_len=16, cache=place / "cache")

    def fit(self, place: Path, name: str, **how: Any) -> Any:
        return up.fit(
            self.model, self.read(place), place / name, seed=self.seed, batch_tokens=40, unit_tokens=60, **how
        )

    def trace(self, place: Path, name: str, **how: Any) -> Any:
        given = {"rank": 4, "top": 2, "batch_tokens": 40, **how}
        factors = up.Factors(place / given.pop("factors", "factors"))
        return up.trace(self.model, self.read(place), up.Queries.read(self.queries), factors, place / name, **given)


# ---- what is read of each artifact


def of_corpus(run: Run, place: Path, name: str, again: dict[str, Any]) -> Iterator[Numbers]:
    data = run.read(place)
    texts = [data.document_text(d) + data.document_id(d) + str(data.metadata(d)) for d in range(data.n_documents)]
    yield {
        "text": texts,
        "tokens": [data.token_ids(n).tolist() for n in range(len(data))],
        "keys": data.keys_N.tolist(),
    }
    yield from of_factors(run, place, "fitted", again)


def of_factors(run: Run, place: Path, name: str, again: dict[str, Any]) -> Iterator[Numbers]:
    factors = run.fit(place, name, **again)
    yield {
        f"{x.name} {kind}": factors.block(x.name, kind).lam_OI.numpy()
        for x in factors.layers
        for kind in ("ekfac", "kfac")
    }
    for kind in ("ekfac", "diagonal"):
        yield tables(run.trace(place, f"{name}-{kind}", factors=name, curvature=kind), kind)


def of_factors_as_they_are(run: Run, place: Path, name: str, again: dict[str, Any]) -> Iterator[Numbers]:
    yield tables(run.trace(place, "of-them", factors=name), "ekfac")
    yield from of_factors(run, place, name, again)


def of_scores(run: Run, place: Path, name: str, again: dict[str, Any]) -> Iterator[Numbers]:
    found = up.Scores(place / name)
    yield tables(found, "ekfac")
    report = json.loads(found.report(place / "page.html").with_suffix(".json").read_text())
    yield {"report": [(q["id"], q["passages"], q["spread"], q["documents"]) for q in report["queries"]]}


def of_trace(run: Run, place: Path, name: str, again: dict[str, Any]) -> Iterator[Numbers]:
    run.trace(place, name, **again)
    yield from of_scores(run, place, name, again)


def tables(scores: Any, kind: str) -> Numbers:
    tops = [scores.top(q["id"], 2, side) for q in QUERIES for side in ("positive", "negative")]
    found = {"scores": scores.frame(), "documents": scores.documents(), **{f"top {i}": x for i, x in enumerate(tops)}}
    return {f"{kind} {name}": frame.to_json() for name, frame in found.items()}


Reader = Callable[[Run, Path, str, dict[str, Any]], Iterator[Numbers]]
READERS: dict[str, list[Reader]] = {  # by the name of the artifact's folder
    "cache": [of_corpus],
    "factors": [of_factors_as_they_are],
    "scores": [of_scores, of_trace],
    "fitting-1": [of_factors],
    "fitting-2": [of_factors],
    "tracing-1": [of_trace],
    "tracing-2": [of_trace],
}


# ---- the undamaged runs


def killed(work: Callable[[], object], commits: int) -> None:
    """Do ``work`` in a process that is killed when it has committed so many files."""
    child = os.fork()
    if child == 0:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the tokenizers are not in a child
        rename, left = os.replace, [commits]

        def counted(*given: Any) -> None:
            rename(*given)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended before"


def commits_of(work: Callable[[], object]) -> int:
    rename, made = os.replace, []

    def counted(*given: Any) -> None:
        made.append(given)
        rename(*given)

    os.replace = counted
    try:
        work()
    finally:
        os.replace = rename
    return len(made)


def make(run: Run, place: Path) -> None:
    run.read(place)
    fits = commits_of(lambda: run.fit(place, "factors"))
    fit_diagonal(run.model, run.read(place), up.Factors(place / "factors"))
    traces = commits_of(lambda: run.trace(place, "scores"))
    for part in (1, 2):
        killed(partial(run.fit, place, f"fitting-{part}"), part * fits // 3)
        killed(partial(run.trace, place, f"tracing-{part}"), part * traces // 3)


def files(place: Path, artifact: str) -> list[Path]:
    """All that is written in an artifact, by their places below it."""
    there = (p.relative_to(place) for p in sorted((place / artifact).rglob("*")) if p.is_file())
    return [p for p in there if not p.name.endswith((".lock", MINE))]


# ---- damage


def flip(file: Path, rng: random.Random) -> None:
    held = bytearray(file.read_bytes())
    held[rng.randrange(len(held))] ^= 1 << rng.randrange(8)
    file.write_bytes(held)


def cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def entries(value: Any) -> list[tuple[Any, Any]]:
    """Every entry of nested JSON: what holds it, and its key or place."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [found for key in keys for found in entries(value[key])]


def change_entry(file: Path, rng: random.Random, change: Callable[[Any, Any], None]) -> None:
    value = json.loads(file.read_text())
    change(*rng.choice(entries(value)))
    file.write_text(json.dumps(value, indent=1))


def of_another_type(rng: random.Random) -> Callable[[Any, Any], None]:
    values = [None, True, -1, 7.5, "text", [], {}, [[1]], {"a": None}]

    def change(holder: Any, key: Any) -> None:
        holder[key] = rng.choice([x for x in values if type(x) is not type(holder[key])])

    return change


def of_another_version(file: Path, rng: random.Random) -> None:
    value = json.loads(file.read_text())
    value.pop("digest")
    value.get("key", value)["schema"] = rng.choice([0, 1, 3, 17])
    write_json(file, value)


def swap(file: Path, beside: list[Path], rng: random.Random) -> bool:
    if not beside:
        return False
    neighbour = rng.choice(beside)
    held = file.read_bytes()
    file.write_bytes(neighbour.read_bytes())
    neighbour.write_bytes(held)
    return True


def replace(file: Path, alike: list[Path]) -> bool:
    if not alike or alike[0].read_bytes() == file.read_bytes():
        return False
    shutil.copy(alike[0], file)
    return True


JSON_ONLY: dict[str, Callable[[Path, random.Random], None]] = {
    "entry removed": lambda file, rng: change_entry(file, rng, lambda holder, key: holder.pop(key)),
    "entry retyped": lambda file, rng: change_entry(file, rng, of_another_type(rng)),
    "version": of_another_version,
}
ANY: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped": flip,
    "cut short": cut,
    "removed": lambda file, rng: file.unlink(),
}
KINDS = (*ANY, "swapped", "of another run", *JSON_ONLY)


def spoil(kind: str, place: Path, name: Path, other: Path, rng: random.Random) -> bool:
    """Spoil a file; false where that kind of damage does not apply to it."""
    file, artifact = place / name, name.parts[0]
    if kind == "swapped":
        return swap(file, [place / p for p in files(place, artifact) if p != name and p.suffix == name.suffix], rng)
    if kind == "of another run":
        theirs = files(other, artifact)
        exact = [other / p for p in theirs if p == name]
        return replace(file, exact or [other / p for p in theirs if p.name == name.name])
    if kind in JSON_ONLY and (
        file.suffix != ".json" or (kind == "version" and name.name not in ("key.json", "manifest.json", "info.json"))
    ):
        return False
    (JSON_ONLY | ANY)[kind](file, rng)
    return True


# ---- outcomes


def outcome(read: Iterator[Numbers], expected: Numbers) -> str:
    """``right``, ``refused``, or what is wrong."""
    try:
        for numbers in read:
            for name, value in numbers.items():
                same = (
                    np.array_equal(value, expected[name]) if isinstance(value, np.ndarray) else value == expected[name]
                )
                if not same:
                    return f"WRONG NUMBER: {name}"
    except UpriverError as error:
        text = str(error)
        return "refused" if "unexpected" not in text and "\n" not in text else f"NOT ONE SENTENCE: {text}"
    except Exception:
        return f"TRACEBACK: {traceback.format_exc()}"
    return "right"


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def tried(
    run: Run, sound: Path, work: Path, kind: str, name: Path, other: Path, rng: random.Random, expected: Numbers
) -> list[str]:
    """The outcomes of all that reads a file after damage of a kind; none where it does not apply."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sound, work)
    if not spoil(kind, work, name, other, rng):
        return []
    artifact = name.parts[0]
    mine = work / artifact / MINE
    if rng.random() < 0.3:
        mine.write_text("mine")
    there = mine.exists()
    told = [outcome(read(run, work, artifact, {}), expected) for read in READERS[artifact]]
    if artifact != "cache" and rng.random() < 0.3:
        again = READERS[artifact][-1](run, work, artifact, {"overwrite": True})
        told.append(outcome(again, expected))
    return [*told, "FOREIGN FILE DELETED"] if there and not mine.exists() else told


def campaign(root: Path, cases: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Returns how often each kind of damage had each outcome, and what was not good."""
    model = up.load_model(save_model(root / "model"), device="cpu")
    more = [r | {"id": f"{r['id']} {n}"} for n in range(2) for r in RECORDS]
    queries = write_jsonl(root / "queries.jsonl", QUERIES)
    run = Run(model, write_jsonl(root / "corpus.jsonl", more), queries, 0)
    sound, other = root / "sound", root / "other"
    make(run, sound)
    make(Run(model, write_jsonl(root / "another.jsonl", more[::-1]), queries, 1), other)
    expected: Numbers = {}
    shutil.copytree(sound, root / "read")
    for name, read in ((name, read) for name, readers in READERS.items() for read in readers):
        for numbers in read(run, root / "read", name, {}):
            assert all(same(x, expected.get(key, x)) for key, x in numbers.items()), (name, read)
            expected |= numbers
    rng = random.Random(seed)
    possible = [(kind, name) for artifact in READERS for name in files(sound, artifact) for kind in KINDS]
    counts: Counter[tuple[str, str]] = Counter()
    bad: list[str] = []
    for kind, name in chain.from_iterable(rng.sample(possible, len(possible)) for _ in count()):
        told = tried(run, sound, root / "work", kind, name, other, rng, expected)
        if told:
            worst = max(told, key=lambda x: (x not in ("right", "refused"), x == "refused"))
            counts[kind, worst.split(":")[0]] += 1
            bad += [f"{kind} {name}: {x}" for x in told if x not in ("right", "refused")]
        if sum(counts.values()) == cases:
            break
    return counts, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to work in, which is left as it is at the end")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.keep:
            given.keep.mkdir(parents=True)
        counts, bad = campaign(given.keep or Path(folder), given.cases, given.seed)
    outcomes = sorted({told for _, told in counts}, key=lambda told: (told not in ("right", "refused"), told))
    print(f"{'damage':16s}" + "".join(f"{told:>22s}" for told in outcomes))
    for kind in KINDS:
        print(f"{kind:16s}" + "".join(f"{counts[kind, told]:22d}" for told in outcomes))
    print(f"{sum(counts.values())} cases, {len(bad)} not good")
    for line in bad:
        print(line)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
