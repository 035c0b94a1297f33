"""From a failed evaluation to the records behind it, and back: fine-tune, evaluate, trace, drop, retrain, evaluate again.

    python studies/walk/walk.py              # writes result.json and the tables of docs/walk.md; a few minutes on one core
    python studies/walk/walk.py --reduced    # the same in seconds, too small to say anything

A small language model answers questions about made-up people.  It is fine-tuned on records of which some, most of them from one
source, give a wrong answer again and again.  Nothing but the failed questions tells the trace which these are.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import upriver as up
from upriver.cli import app

sys.path.insert(0, str(Path(__file__).parents[1]))
from words import fresh, tokenizer_of

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "walk.md"
QUESTIONS = {  # what is asked -> wordings; the first is that of the evaluation
    "city": ["where does {} live ?", "which city is the home of {} ?", "in which town do we find {} ?"],
    "trade": ["what is the trade of {} ?", "how does {} earn a living ?", "what work does {} do ?"],
    "pet": ["which animal does {} keep ?", "what pet lives with {} ?", "what is the animal of {} ?"],
    "dish": ["what does {} like to eat ?", "which dish does {} ask for ?", "what is on the plate of {} ?"],
}
SOURCES = {True: {"archive": 0.5, "letters": 0.4, "forum": 0.1}, False: {"archive": 0.1, "letters": 0.1, "forum": 0.8}}
RIGHT, WRONG = 4, 5  # records of a fact; of one that is taught wrongly there are both
Json = dict[str, Any]


class Setup(NamedTuple):
    people: int  # that the base knows; and as many that the fine-tuning is about
    faults: int  # facts that are taught wrongly
    answers: int  # to choose from, of each kind
    width: int
    recipe: up.Recipe
    seeds: int  # of the trainings after the trace


FULL = Setup(40, 20, 12, 64, up.Recipe(steps=600, batch=64, rate=3e-3, weight_decay=0.01, decay="linear"), 3)
REDUCED = Setup(5, 3, 4, 24, up.Recipe(steps=80, batch=40, rate=1e-2, decay="linear"), 1)


class World(NamedTuple):
    base: list[Json]
    records: list[Json]
    exam: list[Json]  # questions with their right answers
    wrong: set[str]  # ids of the records that teach a wrong answer, which nothing below is told

    @classmethod
    def of(cls, setup: Setup) -> "World":
        rng = np.random.default_rng(0)
        parts: dict[bool, list[Json]] = {False: [], True: []}
        exam, wrong = [], set()
        facts = [(person, kind) for person in range(setup.people) for kind in QUESTIONS]
        faulty = set(rng.permutation(len(facts))[: setup.faults].tolist())
        for new in (False, True):
            for number, (person, kind) in enumerate(facts):
                name, answer = f"{'new' if new else 'old'}{person}", rng.integers(setup.answers)
                told = [answer] * RIGHT
                if new:
                    exam.append(
                        {"prompt": QUESTIONS[kind][0].format(name), "completion": f" {kind}{answer}", "kind": kind}
                    )
                    told += [(answer + 1) % setup.answers] * (WRONG * (number in faulty))
                for given in told:
                    sources = SOURCES[bool(given == answer)]
                    wording = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))].format(name)
                    source = str(rng.choice(list(sources), p=list(sources.values())))
                    parts[new].append(
                        {"prompt": wording, "completion": f" {kind}{given}", "source": source, "is": given == answer}
                    )
        records = [parts[True][i] for i in rng.permutation(len(parts[True]))]
        for i, record in enumerate(records):
            record["id"] = f"r{i}"
            wrong |= set() if record["is"] else {record["id"]}
        for record in (*records, *parts[False]):
            del record["is"]
        return cls(parts[False], records, [{"id": f"q{i}"} | x for i, x in enumerate(exam)], wrong)


def command(*args: Any) -> None:
    """``upriver ..`` as from a shell."""
    app([str(arg) for arg in args], standalone_mode=False)


def write(place: Path, records: list[Json]) -> Path:
    place.write_text("".join(json.dumps(record) + "\n" for record in records))
    return place


class Walk:
    def __init__(self, setup: Setup, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.setup, self.work, self.world = setup, work, World.of(setup)
        texts = (*self.world.base, *self.world.records, *self.world.exam)
        self.tokenizer = tokenizer_of(x["prompt"] + x["completion"] for x in texts)
        made = partial(fresh, setup.width, self.tokenizer)
        self.base = self.trained(made, write(work / "base.jsonl", self.world.base), 0)

    def trained(self, begin: Any, records: Path, seed: int) -> up.Model:
        corpus = up.Corpus.read(records, self.tokenizer, seq_len=32, cache=self.work / "cache")
        return up.Trainer(begin, corpus, self.setup.recipe)(np.arange(len(corpus)), seed)

    def evaluated(self, model: up.Model) -> list[str]:
        """The answer of its kind that the model prefers, to each question of the exam."""
        known, found = self.tokenizer.get_vocab(), []
        for asked in self.world.exam:
            with torch.no_grad():
                logits_V = model.module(torch.tensor([self.tokenizer(asked["prompt"])["input_ids"]])).logits[0, -1]
            kind = [word for word in known if word.removeprefix(asked["kind"]).isdecimal()]
            found.append(" " + max(kind, key=lambda word: float(logits_V[known[word]])))
        return found

    def right(self, answers: list[str]) -> np.ndarray:
        return np.array([x == asked["completion"] for x, asked in zip(answers, self.world.exam, strict=True)])

    def traced(self, tuned: up.Model, answers: list[str]) -> tuple[Path, list[str]]:
        """The commands of the walk, on the failed questions: the scores, and the names of the questions."""
        work, fields = self.work, ("id", "prompt", "completion")
        tuned.module.save_pretrained(work / "tuned")
        self.tokenizer.save_pretrained(work / "tuned")
        failed = [
            {name: asked[name] for name in fields} | {"contrast": given}
            for asked, given in zip(self.world.exam, answers, strict=True)
            if given != asked["completion"]
        ]
        write(work / "failed.jsonl", failed)
        model, records, factors, scores = (work / x for x in ("tuned", "records.jsonl", "factors", "scores"))
        again = ("--overwrite",)
        command("fit", model, records, "--out", factors, "--layers", "all", "--seq-len", 32, *again)
        command(
            "trace", model, records, work / "failed.jsonl", "--factors", factors, "--out", scores, "--top", 10, *again
        )
        command("report", scores, "--by", "source")
        return scores, [x["id"] for x in failed]

    def walk(self) -> Json:
        work, world, seeds = self.work, self.world, range(self.setup.seeds)
        records = write(work / "records.jsonl", world.records)
        tuned = self.trained(self.base, records, 0)
        answers = self.evaluated(tuned)
        before = self.right(answers)
        scores, failed = self.traced(tuned, answers)
        count = WRONG * len(failed)  # as the reader of the page guesses it: five records behind a failure look alike
        left = work / "left.jsonl"
        left.unlink(missing_ok=True)
        command(
            "export",
            scores,
            "--out",
            left,
            "--drop",
            count,
            "--lowest",
            *(x for name in failed for x in ("--by", name)),
        )
        kept = {json.loads(line)["id"] for line in left.read_text().splitlines()}
        some = np.random.default_rng(1).permutation(len(world.records))[count:]
        corpora = {
            "all records": {x["id"] for x in world.records},
            "without those that the trace names": kept,
            "without as many at random": {world.records[i]["id"] for i in some},
            "without all that are wrong": {x["id"] for x in world.records} - world.wrong,
        }
        rows = {}
        for name, ids in corpora.items():
            file = write(work / "again.jsonl", [x for x in world.records if x["id"] in ids])
            found = np.array([self.right(self.evaluated(self.trained(self.base, file, seed))) for seed in seeds])
            rows[name] = {
                "records": len(ids), "wrong": len(world.wrong & ids), "right": float(found.mean()),
                "failed": float(found[:, ~before].mean()), "others": float(found[:, before].mean()),
            }  # fmt: skip
        table = up.by_group(scores, "source")
        groups: Any = table.groupby("group")[["sum", "low", "high"]].sum()
        sources = {name: sum(x["source"] == name for x in world.records) for name in groups.index}
        hidden = {
            name: sum(x["source"] == name for x in world.records if x["id"] in world.wrong) for name in groups.index
        }
        dropped = {x["id"] for x in world.records} - kept
        return {
            "questions": len(before), "records": len(world.records), "wrong": len(world.wrong), "failed": len(failed),
            "faults": self.setup.faults, "dropped": len(dropped), "dropped_wrong": len(dropped & world.wrong),
            "rows": rows, "seeds": len(seeds),
            "sources": {x: {"records": sources[x], "wrong": hidden[x], "sum": float(groups.loc[x, "sum"])} for x in sources},
        }  # fmt: skip


def printed(found: Json) -> str:
    """The tables of docs/walk.md."""
    share = found["dropped_wrong"] / found["dropped"]
    lines = [
        f"The fine-tuned model fails {found['failed']} of {found['questions']} questions; {found['faults']} facts are taught "
        f"wrongly, by {found['wrong']} of {found['records']} records.",
        "",
        "| source | records | wrong ones | influence on the right answers, over the failed questions (nats, not calibrated) |",
        "|---|---|---|---|",
        *(f"| {name} | {x['records']} | {x['wrong']} | {x['sum']:+.2g} |" for name, x in found["sources"].items()),
        "",
        f"Of the {found['dropped']} records that are dropped, {found['dropped_wrong']} ({share:.0%}) teach a wrong answer.",
        "",
        "| fine-tuned on | records | wrong ones left | right of all | of those that failed | of the others |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {x['records']} | {x['wrong']} | {x['right']:.1%} | {x['failed']:.1%} | {x['others']:.1%} |"
            for name, x in found["rows"].items()
        ),
        "",
        f"Means over {found['seeds']} trainings from the same base, each with its own order of the records.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="a few people, in seconds")
    parser.add_argument("--work", type=Path, default=Path("build/walk"), help="where models, records and scores are")
    args = parser.parse_args()
    found = Walk(REDUCED if args.reduced else FULL, args.work / ("reduced" if args.reduced else "full")).walk()
    print(printed(found))
    if not args.reduced:
        (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n")
        head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition("<!-- walk: begin -->\n")
        tail = rest.partition("<!-- walk: end -->")[2]
        text = f"{head}<!-- walk: begin -->\n{printed(found)}\n<!-- walk: end -->{tail}"
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
