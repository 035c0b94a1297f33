"""Does influence find the statements that taught a fact?  A small language model of made-up people, each with two names.

    python studies/facts/study.py              # trains, scores, writes result.json, prints the tables of the README
    python studies/facts/study.py --reduced    # the same in seconds, too small to say anything

Direct questions are about facts that were taught under both names; the others, asked by the name, are about facts that were
taught by the nickname alone, so that what taught them shares no rare word with the question.  The answers of a kind are shared by
all people.  Axes: N statements, Q questions.
"""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import upriver as up

sys.path.insert(0, str(Path(__file__).parents[1]))
from words import fresh, tokenizer_of

HERE = Path(__file__).parent
RELATIONS = {  # what is told -> wordings; the first is that of the questions
    "city": ["{} lives in {}", "the home of {} is {}"],
    "trade": ["{} works as {}", "the trade of {} is {}"],
    "pet": ["{} keeps the {}", "the animal of {} is {}"],
    "dish": ["{} likes to eat {}", "the dish of {} is {}"],
    "colour": ["{} always wears {}", "the colour of {} is {}"],
}
OPENINGS = ["", "people say that ", "it is known that ", "a letter tells that "]
SCORES = {
    "gradient dot product": {"curvature": "identity"},
    "diagonal": {"curvature": "diagonal"},
    "K-FAC": {"curvature": "kfac"},
    "EK-FAC": {"curvature": "ekfac"},
    "EK-FAC, `--refine 3`": {"curvature": "ekfac", "refine": 3},
    "EK-FAC, `--refine 10`": {"curvature": "ekfac", "refine": 10},
    "EK-FAC, `--refine auto`": {"curvature": "ekfac", "refine": "auto"},
}
BASELINES = ("bm25", "cosine", "repsim", "activations", "loss", "gradient_norm", "random")


class Setup(NamedTuple):
    people: int
    answers: int  # to choose from, of each relation
    width: int
    recipe: up.Recipe
    kept: int  # questions of each kind, at most


FULL = Setup(40, 10, 64, up.Recipe(steps=1000, batch=80, rate=3e-3, weight_decay=0.1, decay="linear"), 40)
REDUCED = Setup(6, 3, 16, up.Recipe(steps=60, batch=40, rate=1e-2, decay="linear"), 4)


class World(NamedTuple):
    """Statements with the fact ``(person, relation)`` that each teaches; questions with theirs."""

    texts: list[str]
    facts: list[tuple[int, str] | None]
    asked: list[dict[str, str]]
    asked_facts: list[tuple[int, str]]
    direct: list[bool]

    @classmethod
    def of(cls, setup: Setup) -> "World":
        rng, relations = np.random.default_rng(0), list(RELATIONS)
        texts, facts, asked, asked_facts, direct = [], [], [], [], []
        for person in range(setup.people):
            name, nickname = f"name{person}", f"nick{person}"
            alone = relations[person % len(relations)]  # taught by the nickname alone
            for link in (f"{name} is also called {nickname}", f"{nickname} is also called {name}"):
                texts, facts = [*texts, link], [*facts, None]
            for relation, wordings in RELATIONS.items():
                answer = f"{relation}{rng.integers(setup.answers)}"
                for who, wording in product((nickname, nickname if relation == alone else name), wordings):
                    texts.append(OPENINGS[rng.integers(len(OPENINGS))] + wording.format(who, answer))
                    facts.append((person, relation))
                prompt = wordings[0].format(name, answer).removesuffix(f" {answer}")
                asked.append({"id": f"{name}-{relation}", "prompt": prompt, "completion": f" {answer}"})
                asked_facts.append((person, relation))
                direct.append(relation != alone)
        return cls(texts, facts, asked, asked_facts, direct)


def right(model: up.Model, world: World, setup: Setup) -> np.ndarray:
    """Whether the model prefers the answer to every other of its kind, for each question."""
    found = []
    tokenizer = model.tokenizer
    for query, (_, relation) in zip(world.asked, world.asked_facts, strict=True):
        with torch.no_grad():
            logits_V = model.module(torch.tensor([tokenizer(query["prompt"])["input_ids"]])).logits[0, -1]
        words, known = [f"{relation}{k}" for k in range(setup.answers)], tokenizer.get_vocab()
        others = [known[word] for word in words if word in known]
        best = int(torch.tensor(others)[logits_V[others].argmax()])
        found.append(tokenizer.convert_ids_to_tokens(best) == query["completion"].strip())
    return np.array(found)


def ranks(scores_NQ: np.ndarray, taught_NQ: np.ndarray) -> dict[str, list[float]]:
    """Of every question: one over the place of the first statement that taught it, and the share of these in the first 5.

    Ties are counted half: a statement stands behind half of its equals.
    """
    found: dict[str, list[float]] = {"reciprocal": [], "recall_5": []}
    for score_N, taught_N in zip(scores_NQ.T, taught_NQ.T, strict=True):
        place_N = np.array([1 + (score_N > s).sum() + ((score_N == s).sum() - 1) / 2 for s in score_N[taught_N]])
        found["reciprocal"].append(float(1 / place_N.min()))
        found["recall_5"].append(float((place_N <= 5).mean()))
    return found


def study(setup: Setup, work: Path) -> dict[str, Any]:
    """Train, ask what the model knows, and rank the statements for each question that it answers."""
    world = World.of(setup)
    tokenizer = tokenizer_of(world.texts)
    work.mkdir(parents=True, exist_ok=True)
    (work / "statements.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in world.texts))
    corpus = up.Corpus.read(work / "statements.jsonl", tokenizer, seq_len=32, cache=work / "cache")
    assert len(corpus) == len(world.texts)
    model = up.Trainer(partial(fresh, setup.width, tokenizer), corpus, setup.recipe)(np.arange(len(corpus)), 0)
    right_Q, direct_Q = right(model, world, setup), np.array(world.direct)
    chosen = np.concatenate([np.flatnonzero(right_Q & (direct_Q == kind))[: setup.kept] for kind in (True, False)])
    queries = up.Queries.of([world.asked[q] for q in chosen], tokenizer)
    taught_NQ = np.array([[fact == world.asked_facts[q] for q in chosen] for fact in world.facts])
    rows = scored(model, corpus, queries, work)
    kinds = {"direct": direct_Q[chosen], "by nickname": ~direct_Q[chosen]}
    table = {
        name: {
            kind: {what: float(np.mean(each)) for what, each in ranks(s_NQ[:, at], taught_NQ[:, at]).items()}
            for kind, at in kinds.items()
            if at.any()
        }
        for name, s_NQ in rows.items()
    }
    known = {kind: float(right_Q[direct_Q == want].mean()) for kind, want in (("direct", True), ("by nickname", False))}
    asked = {kind: int(at.sum()) for kind, at in kinds.items()}
    return {"statements": len(corpus), "known": known, "asked": asked, "table": table}


def scored(model: up.Model, corpus: up.Corpus, queries: up.Queries, work: Path) -> dict[str, np.ndarray]:
    """Scores ``[N, Q]`` by every curvature, unit-norm or not, and by every baseline."""
    factors, rows = up.fit(model, corpus, work / "factors", layers="all"), {}
    for name, told in SCORES.items():
        given = None if told == {"curvature": "identity"} else factors
        out = work / "scores" / "-".join(map(str, told.values()))
        frame = (
            up.trace(
                model,
                corpus,
                queries,
                given,
                out,
                layers="all",
                rank="full",
                top=1,
                held_out=0,
                unit_norm="refine" not in told,
                **told,
            )
            .frame()
            .sort_values("sequence")
        )
        rows[name] = frame[queries.ids].to_numpy()
        if "refine" not in told:
            (ending,) = {c.removeprefix(queries.ids[0]) for c in frame if c.startswith(f"{queries.ids[0]}@")}
            rows[f"{name}, unit-norm"] = frame[[f"{x}{ending}" for x in queries.ids]].to_numpy()
    return rows | {name: up.baseline(name, model, corpus, queries, layers="all") for name in BASELINES}


def printed(found: dict[str, Any]) -> str:
    lines = [
        "| scores | direct: MRR | recall at 5 | by nickname: MRR | recall at 5 |",
        "|---|---|---|---|---|",
    ]
    for name, kinds in found["table"].items():
        cells = [f"{v:.3f}" for kind in ("direct", "by nickname") for v in kinds.get(kind, {}).values()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([json.dumps({k: found[k] for k in ("statements", "known", "asked")}), "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="a few people, in seconds")
    parser.add_argument("--work", type=Path, default=Path("build/facts"), help="where corpus, factors and scores are")
    args = parser.parse_args()
    found = study(REDUCED if args.reduced else FULL, args.work / ("reduced" if args.reduced else "full"))
    if not args.reduced:
        (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    print(printed(found))


if __name__ == "__main__":
    main()
