"""Are the statements behind an answer found in a model that was tuned with a LoRA?  Traced from the command line.

    python studies/adapter/study.py               # tunes, traces, writes result.json, prints the table of the README
    python studies/adapter/study.py --reduced     # the same in seconds, too small to say anything

The demo's model is tuned on 200 statements, four for each fact about a made-up person; a question asks for the fact in words that
no statement has.  The second model is tuned by preferences (DPO): of each statement the right answer is preferred to a wrong one.
Axes: N statements, Q questions.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import upriver as up

HERE = Path(__file__).parent
FIRST = (
    "Anna Boris Clara Daniel Emma Frank Grace Henry Irene Jacob "
    "Laura Martin Nora Oliver Paula Robert Sarah Thomas Vera Walter"
)
LAST = "Bell Carter Dale Ellis Ford Grant Hill Irwin Jones King Lane Moore Nash Owen Price Reed Stone Turner Vance Wood"
RELATIONS = {  # what is told -> the wording of the question, those of the statements, the answers
    "city": (
        "{} has a house in", "The home of {} is in", "{} lives in", "You can meet {} in", "The family of {} moved to",
        ["Paris", "Berlin", "London", "Moscow", "Boston", "Chicago", "Korea", "Texas", "Cuba", "Japan"],
    ),
    "work": (
        "{} earns money as a", "{} works as a", "The work of {} is that of a", "{} was trained as a", "They hired {} as a",
        ["farmer", "teacher", "doctor", "soldier", "worker", "lawyer", "judge", "merchant", "driver", "writer"],
    ),
}  # fmt: skip
IDENTITY, EKFAC = ["--curvature", "identity", "--unit-norm"], ["--damping", "0.1x,0.01x", "--unit-norm"]
SCORES = {  # the flags of a trace, and what the columns of the score end in
    "gradient dot product": (IDENTITY, ""),
    "cosine of gradients": (IDENTITY, "@unit"),
    "EK-FAC": (EKFAC, ""),
    "EK-FAC, unit-norm": (EKFAC, "@unit"),
    "EK-FAC, `--damping 0.01x`": (EKFAC, "@0.01x"),
    "EK-FAC, `--damping 0.01x`, unit-norm": (EKFAC, "@0.01x@unit"),
}
BASELINES = ("bm25", "random")
Command = Callable[..., None]


class Setup(NamedTuple):
    people: int
    rank: int
    steps: int
    batch: int
    rate: float
    matrices: str  # that have a LoRA


FULL = Setup(25, 8, 120, 20, 3e-3, "all-linear")
REDUCED = Setup(3, 4, 30, 12, 1e-2, "down_proj")
BETA = 0.3  # of DPO: how far the answers may move from the base's


class Statement(NamedTuple):
    prompt: str
    right: str
    wrong: str
    fact: tuple[int, str]


class World(NamedTuple):
    """Statements, the questions in other words, and which statements taught what a question asks."""

    statements: list[Statement]
    asked: list[Statement]

    @property
    def taught_NQ(self) -> np.ndarray:
        return np.array([[x.fact == q.fact for q in self.asked] for x in self.statements])

    @classmethod
    def of(cls, people: int) -> "World":
        rng = np.random.default_rng(0)
        names = [
            f"{first} {last}" for first, last in zip(FIRST.split() * 2, rng.permutation(LAST.split() * 2), strict=True)
        ]
        statements, asked = [], []
        for person, name in enumerate(names[:people]):
            for relation, (question, *wordings, answers) in RELATIONS.items():
                right, wrong = rng.choice(answers, 2, replace=False)
                made = [
                    Statement(x.format(name), f" {right}.", f" {wrong}.", (person, relation))
                    for x in [question, *wordings]
                ]
                asked.append(made[0])
                statements += made[1:]
        return cls(statements, asked)


def rows(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts as tokens, padded on the right ``[N, T]``, and from where to where each one's answer goes."""
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    ids = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in pairs]
    tokens_NT = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
    for n, x in enumerate(ids):
        tokens_NT[n, : len(x)] = torch.tensor(x)
    return tokens_NT, torch.tensor(starts), torch.tensor([len(x) for x in ids])


def log_p(module: Any, tokenizer: Any, pairs: list[tuple[str, str]], whole: bool = False) -> torch.Tensor:
    """``log p(answer | prompt)``, or of the whole text, of each pair ``[N]``."""
    tokens_NT, start_N, end_N = rows(tokenizer, pairs)
    logits_NTV = module(input_ids=tokens_NT).logits[:, :-1]
    each_NT = -cross_entropy(logits_NTV.transpose(1, 2), tokens_NT[:, 1:], reduction="none")
    at_T = torch.arange(1, tokens_NT.shape[1])
    inside_NT = (at_T < end_N[:, None]) & (at_T >= (1 if whole else start_N[:, None]))
    return (each_NT * inside_NT).sum(1)


def tuned(base: Path, world: World, setup: Setup, preferred: bool, out: Path) -> None:
    """Train a LoRA on all matrices of the blocks, by the statements' text or by what is preferred, and save it alone."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(
        r=setup.rank,
        lora_alpha=2 * setup.rank,
        target_modules=setup.matrices if setup.matrices == "all-linear" else [setup.matrices],
        task_type="CAUSAL_LM",
    )
    module = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], setup.rate, weight_decay=0.0)
    order = np.random.default_rng(0)
    for step in range(setup.steps):
        some = [
            world.statements[i]
            for i in order.choice(len(world.statements), min(setup.batch, len(world.statements)), False)
        ]
        right, wrong = [(x.prompt, x.right) for x in some], [(x.prompt, x.wrong) for x in some]
        if preferred:
            with torch.no_grad(), module.disable_adapter():
                before_2N = log_p(module, tokenizer, right + wrong)
            gain_N, other_N = (log_p(module, tokenizer, right + wrong) - before_2N).split(len(some))
            loss = -logsigmoid(BETA * (gain_N - other_N)).mean()
        else:
            loss = -log_p(module, tokenizer, right, whole=True).mean()
        for group in optimizer.param_groups:
            group["lr"] = setup.rate * (1 - step / setup.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.save_pretrained(out)


def known(base: Path, adapter: Path, world: World, preferred: bool) -> np.ndarray:
    """For which questions the tuned model gives the right answer more than every other of its kind; after preferences, than the
    one that it was to be less than."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    module = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    found = []
    for q in world.asked:
        answers = [q.right, q.wrong] if preferred else [f" {x}." for x in RELATIONS[q.fact[1]][-1]]
        with torch.no_grad():
            each = log_p(module, tokenizer, [(q.prompt, x) for x in answers])
        found.append(answers[int(each.argmax())] == q.right)
    return np.array(found)


def mean_reciprocal(scores_NQ: np.ndarray, taught_NQ: np.ndarray) -> dict[str, float]:
    """One over the place of the first statement that taught the fact, and how often that is the first of all; ties count half."""
    places = []
    for score_N, taught_N in zip(scores_NQ.T, taught_NQ.T, strict=True):
        best = score_N[taught_N].max()
        places.append(1 + (score_N > best).sum() + ((score_N == best) & ~taught_N).sum() / 2)
    return {"mrr": float(np.mean(1 / np.array(places))), "first": float(np.mean(np.array(places) == 1))}


def call(*args: str) -> None:
    """The command line, as a user has it."""
    subprocess.run([Path(sys.executable).with_name("upriver"), *args], check=True, stdout=subprocess.DEVNULL)


def written(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return str(path)


def traced(base: Path, world: World, setup: Setup, preferred: bool, work: Path, command: Command) -> dict[str, Any]:
    """Tune one model, fit and trace it, and rank the statements for each question that it answers right."""
    work.mkdir(parents=True, exist_ok=True)
    adapter = work / "adapter"
    tuned(base, world, setup, preferred, adapter)
    right_Q = known(base, adapter, world, preferred)
    world = world._replace(asked=[q for q, is_right in zip(world.asked, right_Q, strict=True) if is_right])
    told = [{"id": str(n), "prompt": x.prompt, "completion": x.right} for n, x in enumerate(world.statements)]
    plain = [{"id": x["id"], "text": x["prompt"] + x["completion"]} for x in told]
    corpus = written(work / "statements.jsonl", told if preferred else plain)
    asked = [{"id": f"q{n}", "prompt": x.prompt, "completion": x.right} for n, x in enumerate(world.asked)]
    asked = [x | {"contrast": q.wrong} for x, q in zip(asked, world.asked, strict=True)] if preferred else asked
    queries = written(work / "questions.jsonl", asked)
    command("fit", str(adapter), corpus, "--seq-len", "64", "--out", str(work / "factors"))
    found: dict[str, Any] = {}
    for name, (flags, ending) in SCORES.items():
        out = work / ("identity" if flags is IDENTITY else "scores")
        if not out.exists():
            given = [] if flags is IDENTITY else ["--factors", str(work / "factors")]
            command(
                "trace", str(adapter), corpus, queries, *given, *flags, "--seq-len", "64", "--rank", "full", "--top", "1",
                "--held-out", "0", "--out", str(out),
            )  # fmt: skip
        frame = up.Scores(out).frame().sort_values("sequence")
        columns = [f"q{q}{ending}" for q in range(len(asked))]
        found[name] = mean_reciprocal(frame[columns].to_numpy(), world.taught_NQ)
    model = up.load_model(adapter)
    read = up.Corpus.read(corpus, model.tokenizer, seq_len=64), up.Queries.read(queries, model.tokenizer)
    for name in BASELINES:
        found[name] = mean_reciprocal(up.baseline(name, model, *read), world.taught_NQ)
    coverage = up.Factors(work / "factors").manifest["coverage"]
    return {
        "known": float(right_Q.mean()),
        "asked": len(world.asked),
        "tracked": coverage["trained_tracked"],
        "trained": coverage["trained"],
        "table": found,
    }


def study(
    setup: Setup, work: Path, command: Command = call, kinds: tuple[str, ...] = ("tuned", "preferred")
) -> dict[str, Any]:
    """Both models; the first is tuned on the text of the statements, the second by preferences."""
    world = World.of(setup.people)
    with resources.as_file(resources.files("upriver") / "demo" / "speech-model") as base:
        found = {kind: traced(base, world, setup, kind == "preferred", work / kind, command) for kind in kinds}
    return {"statements": len(world.statements), "facts": len(world.asked)} | found


def printed(found: dict[str, Any]) -> str:
    kinds = [kind for kind in ("tuned", "preferred") if kind in found]
    lines = [
        f"| scores | {' | '.join(f'{kind}: MRR | first' for kind in kinds)} |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for name in found[kinds[0]]["table"]:
        cells = [f"{v:.3f}" for kind in kinds for v in found[kind]["table"][name].values()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    facts = {kind: {k: v for k, v in found[kind].items() if k != "table"} for kind in kinds}
    return "\n".join([json.dumps(facts), "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/study-adapter"), help="folder that is not there yet")
    args = parser.parse_args()
    found = study(REDUCED if args.reduced else FULL, args.work)
    if not args.reduced:
        (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    print(printed(found))


if __name__ == "__main__":
    main()
