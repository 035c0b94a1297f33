"""How well do scores rank what a retrained language model says?  Sources that contradict each other, and half of them left out.

    python studies/lds/language.py             # 60 fine-tunings and all scores, then the table of the README; resumes
    python studies/lds/language.py --reduced   # the same in seconds, too small to say anything

Several sources tell where people live and what they do, and do not agree; a small transformer that knows the
words is fine-tuned on what they tell, and on chatter.  Which half of the statements it saw decides what it answers.
Axes: N statements, Q questions, S subsets.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import upriver as up

sys.path.insert(0, str(Path(__file__).parents[1]))
from words import tokenizer_of

RELATIONS = {"city": "{} lives in {}", "trade": "{} works as {}"}
SOLVERS: dict[str, dict[str, Any]] = {
    "gradient dot product (identity)": {"curvature": "identity"},
    "TracInCP, 5 checkpoints": {"curvature": "tracincp"},
    "diagonal": {"curvature": "diagonal"},
    "K-FAC": {"curvature": "kfac"},
    "EK-FAC": {"curvature": "ekfac"},
    "EK-FAC, `--refine 3`": {"curvature": "ekfac", "refine": 3},
    "EK-FAC, `--refine 10`": {"curvature": "ekfac", "refine": 10},
    "EK-FAC, `--refine auto`": {"curvature": "ekfac", "refine": "auto"},
    "conjugate gradients, 30 steps": {"curvature": "cg", "solver_steps": 30},
    "Arnoldi, rank 50": {"curvature": "arnoldi", "solver_rank": 50},
    "Nystrom, rank 50": {"curvature": "nystrom", "solver_rank": 50},
    "LiSSA, 30 steps": {"curvature": "lissa", "solver_steps": 30},
}
BASELINES = ("bm25", "cosine", "repsim", "activations", "loss", "gradient_norm", "random")


class Setup(NamedTuple):
    people: int
    sources: int
    told: int  # statements about each fact, from as many sources
    values: int  # of each relation
    chatter: int  # sequences of ten random words
    asked: int
    width: int
    subsets: int
    recipe: up.Recipe
    before: up.Recipe  # from which the model knows the words

    @property
    def damping(self) -> str:
        """The pull of the training back to where it began: its weight decay, and one over the sum of its rates."""
        r = self.recipe
        return f"{r.weight_decay + (1 - r.momentum) / (r.rate * r.steps):.6g}"


FULL = Setup(
    12, 8, 4, 6, 48, 20, 32, 60,
    up.Recipe(optimizer="sgd", momentum=0.9, rate=0.0045, steps=80, weight_decay=1e-4),
    up.Recipe(steps=300, batch=64, rate=3e-3, decay="linear"),
)  # fmt: skip
REDUCED = Setup(
    4, 4, 4, 3, 4, 4, 8, 8,
    up.Recipe(optimizer="sgd", momentum=0.9, rate=0.02, steps=20, weight_decay=1e-4), up.Recipe(steps=20, batch=16, rate=1e-2),
)  # fmt: skip


class Transformer(nn.Module):
    """Blocks of attention and perceptron, whose weights are all those of linear layers: what is trained is what is tracked."""

    def __init__(self, vocabulary: int, width: int, blocks: int = 2, heads: int = 4):
        super().__init__()
        self.heads, self.vocabulary = heads, vocabulary
        self.embed, self.head = nn.Linear(vocabulary, width, bias=False), nn.Linear(width, vocabulary, bias=False)
        shapes = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (1, 4), "down": (4, 1)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(i * width, o * width, bias=False) for name, (i, o) in shapes.items()})
            for _ in range(blocks)
        )
        angle_TH = torch.arange(32)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("place_TH", torch.cat([angle_TH.sin(), angle_TH.cos()], 1), persistent=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        dtype = self.head.weight.dtype
        h_NTH = self.embed(F.one_hot(input_ids, self.vocabulary).to(dtype)) * 4
        h_NTH = h_NTH + self.place_TH[: input_ids.shape[1]].to(dtype)
        for block in self.blocks:
            x_NTH = normed(h_NTH)
            q, k, v = (block[name](x_NTH).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in "qkv")  # type: ignore
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            h_NTH = h_NTH + block["o"](seen)  # type: ignore
            h_NTH = h_NTH + block["down"](F.gelu(block["up"](normed(h_NTH))))  # type: ignore
        return SimpleNamespace(logits=self.head(normed(h_NTH)))


def normed(h_NTH: Tensor) -> Tensor:
    return F.layer_norm(h_NTH, h_NTH.shape[-1:])


class World(NamedTuple):
    """What was told before, what the sources tell, and what is asked."""

    before: list[str]
    told: list[str]
    asked: list[dict[str, str]]

    @classmethod
    def of(cls, setup: Setup) -> "World":
        """Before: every person with every value, so that none is preferred, and chatter.

        Told: each fact by some sources, half of which agree on the value that is asked for, while each of the others has its own.
        """
        rng, told, facts = np.random.default_rng(0), [], []
        people = [f"name{i}" for i in range(setup.people)]
        for person in people:
            for relation, wording in RELATIONS.items():
                values = [f"{relation}{k}" for k in rng.permutation(setup.values)]
                claimed = [values[max(0, k - setup.told // 2 + 1)] for k in range(setup.told)]
                sources = rng.permutation(setup.sources)[: setup.told]
                told += [f"{wording.format(person, v)} says source{s}" for v, s in zip(claimed, sources, strict=True)]
                prompt = wording.format(person, "").strip()
                facts.append({"id": f"{person}-{relation}", "prompt": prompt, "completion": f" {values[0]}"})
        before = [
            f"{wording.format(person, f'{relation}{k}')} says source{rng.integers(setup.sources)}"
            for person in people
            for relation, wording in RELATIONS.items()
            for k in range(setup.values)
        ]
        words = sorted({word for text in told for word in text.split()})
        told += [" ".join(rng.choice(words, 10)) for _ in range(setup.chatter)]
        before += [" ".join(rng.choice(words, 10)) for _ in range(2 * setup.chatter)]
        asked = [facts[i] for i in np.sort(rng.permutation(len(facts))[: setup.asked])]
        return cls(before, [told[i] for i in rng.permutation(len(told))], asked)


class Case(NamedTuple):
    corpus: up.Corpus
    queries: up.Queries
    trainer: up.Trainer

    @classmethod
    def of(cls, setup: Setup, work: Path) -> "Case":
        world = World.of(setup)
        tokenizer = tokenizer_of(world.before)
        before, corpus = (
            read(texts, tokenizer, work / name) for name, texts in zip(("before", "told"), world, strict=False)
        )
        module = up.Trainer(lambda: begun(setup, tokenizer), before, setup.before)(np.arange(len(before)), 0)
        return cls(corpus, up.Queries.of(world.asked, tokenizer), up.Trainer(module, corpus, setup.recipe))


def begun(setup: Setup, tokenizer: PreTrainedTokenizerFast) -> up.Model:
    return up.Model(Transformer(len(tokenizer), setup.width), tokenizer)


def read(texts: list[str], tokenizer: PreTrainedTokenizerFast, path: Path) -> up.Corpus:
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = up.Corpus.read(path.with_suffix(".jsonl"), tokenizer, seq_len=16, cache=path.parent / "cache")
    assert len(corpus) == len(texts)
    return corpus


class Row(NamedTuple):
    """A line of the table: scores ``[N, Q]``, and the seconds of the processor that they took."""

    scores_NQ: np.ndarray
    seconds: float


def study(setup: Setup, work: Path, solvers: Mapping[str, dict[str, Any]] = SOLVERS) -> tuple[up.Bank, dict[str, Row]]:
    """Fine-tune on every half, then score by every solver and baseline, on the model that saw all statements."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    case = Case.of(setup, work)
    bank = up.retrain(case.trainer, up.random_subsets(len(case.corpus), setup.subsets), case.queries, work / "bank")
    rows = {"metagradient": kept(work / "metagradient", lambda: up.metagradients(case.trainer, case.queries).nats_NQ)}
    model = case.trainer(np.arange(len(case.corpus)), 0)
    start = time.process_time()
    factors = up.fit(model, case.corpus, work / "factors", layers="*", max_tokens=None, draws=8)
    fitted = kept(work / "fit", lambda: np.zeros(0), time.process_time() - start).seconds
    for name, how in solvers.items():
        row = kept(
            work / "-".join(map(str, how.values())), lambda how=how: traced(setup, case, model, factors, how, work)
        )
        plain = how["curvature"] in ("identity", "tracincp")
        rows[name] = row._replace(seconds=row.seconds + (0 if plain else fitted))
    for name in BASELINES:
        found = kept(work / name, lambda name=name: up.baseline(name, model, case.corpus, case.queries, layers="*"))
        rows[name] = found
    return bank, rows


def traced(
    setup: Setup, case: Case, model: up.Model, factors: up.Factors, how: dict[str, Any], work: Path
) -> np.ndarray:
    """Scores of every statement by one solver, at full rank, with the damping of the training."""
    plain = how["curvature"] in ("identity", "tracincp")
    more: dict[str, Any] = {} if plain else {"damping": setup.damping}
    if how["curvature"] == "tracincp":
        more["checkpoints"] = [(checkpoint(case, share), setup.recipe.rate) for share in (0.2, 0.4, 0.6, 0.8, 1.0)]
    result = up.trace(
        model, case.corpus, case.queries, None if plain else factors, work / "scores" / "-".join(map(str, how.values())),
        layers="*", rank="full", top=1, held_out=0, **how, **more,
    )  # fmt: skip
    return result.frame().sort_values("sequence")[case.queries.ids].to_numpy()


def checkpoint(case: Case, share: float) -> up.Model:
    """The model as it is after a share of the steps; the rate being constant, a shorter training ends there."""
    recipe = replace(case.trainer.recipe, steps=max(1, round(share * case.trainer.recipe.steps)))
    return replace(case.trainer, recipe=recipe)(np.arange(len(case.corpus)), 0)


def kept(path: Path, make: Any, seconds: float | None = None) -> Row:
    """What ``make`` gives, and the seconds it took, kept in a file."""
    path = path.with_name(path.name + ".npz")
    if not path.exists():
        start = time.process_time()
        scores_NQ = make()
        print(f"{path.stem}: {time.process_time() - start:.1f} s", flush=True)
        np.savez(path, scores=scores_NQ, seconds=time.process_time() - start if seconds is None else seconds)
    with np.load(path) as found:
        return Row(found["scores"], float(found["seconds"]))


def table(bank: up.Bank, rows: dict[str, Row]) -> str:
    """For the README."""
    base = up.lds(bank, rows["EK-FAC"].scores_NQ).mean
    lines = ["| scores | LDS | times EK-FAC's | seconds |", "|---|---|---|---|"]
    for name, row in rows.items():
        found = up.lds(bank, row.scores_NQ)
        seconds = "" if name in BASELINES else f"{row.seconds:.1f}"
        lines.append(f"| {name.replace('_', ' ')} | {found} | {found.mean / base:.2f} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="a few small trainings")
    parser.add_argument(
        "--work", type=Path, default=Path("build/lds"), help="where the bank, factors and scores are kept"
    )
    args = parser.parse_args()
    setup, name = (REDUCED, "language-reduced") if args.reduced else (FULL, "language")
    print(table(*study(setup, args.work / name)))


if __name__ == "__main__":
    main()
