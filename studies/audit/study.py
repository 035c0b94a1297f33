"""How much planted label noise an audit finds: `upriver audit` on digits, FashionMNIST and prompts with wrong answers.

    python studies/audit/study.py digits
    python studies/audit/study.py fashion --path PATH        # a folder with train-images-idx3-ubyte.gz and train-labels-idx1-...,
                                                             # or a file .npz with the arrays train_images and train_labels
    python studies/audit/study.py records                    # 15 epochs of training; with --epochs 25 it knows them by heart

Each trains its model on the noisy data, once (kept under --work, from which an interrupted run goes on), audits that data, writes
`NAME.json` beside this file and prints its table.
"""

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import upriver as up

HERE = Path(__file__).parent
MEASURES = ("loss", "gradient_norm", "self_influence", "harm")
CURVATURES = ("ekfac", "kfac", "diagonal")
SHARES = (0.05, 0.10, 0.15, 0.20)  # of the records, the most suspect first, that are looked at
PEOPLE, FAILED, EPOCHS = 50, 60, 15


class Case(NamedTuple):
    """A model, the noisy data that it was trained on, which rows of it are wrong, and what the model fails at."""

    model: up.Model
    data: Any
    planted: np.ndarray
    failed: Any
    behind: np.ndarray | None = None  # which of the planted rows are about what it fails at, where that is known


# ---- labelled examples


def labelled(x: np.ndarray, y: np.ndarray, train: int, seed: int, hidden: int, epochs: int, work: Path) -> Case:
    """A perceptron trained with 10 % of its labels flipped; asked about what it predicts wrongly of the rest, as it should be."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x_NI, y_N = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    classes = int(y_N.max()) + 1
    planted = np.zeros(train, bool)
    planted[rng.choice(train, train // 10, replace=False)] = True
    noisy_N = y_N[:train].clone()
    noisy_N[planted] = (noisy_N[planted] + torch.tensor(rng.integers(1, classes, planted.sum()))) % classes
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(x_NI.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))
    if (kept := work / "net.pt").exists():
        net.load_state_dict(torch.load(kept, weights_only=True))
    else:
        fit_net(net, x_NI[:train], noisy_N, epochs)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), kept)
    with torch.no_grad():
        wrong = torch.where(net(x_NI[train:]).argmax(1) != y_N[train:])[0][:FAILED] + train
    model = up.Model(net, task=up.Classification(), name="perceptron")
    return Case(model, up.Examples({"x": x_NI[:train], "y": noisy_N}), planted, (x_NI[wrong], y_N[wrong]))


def fit_net(net: nn.Module, x_NI: torch.Tensor, y_N: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x_NI)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x_NI[rows]), y_N[rows]).backward()
            optimizer.step()


def digits(seed: int, work: Path, train: int = 1400, epochs: int = 30) -> Case:
    from sklearn.datasets import load_digits

    found = load_digits()
    return labelled(found.data / 16.0, found.target, train, seed, 64, epochs, work)


def fashion(seed: int, work: Path, path: Path) -> Case:
    if path.is_dir():
        images, labels = (idx(path / f"train-{x}-ubyte.gz") for x in ("images-idx3", "labels-idx1"))
    else:
        with np.load(path) as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"]
    x_NI = images.reshape(len(images), -1)[:12_000] / 255.0
    return labelled(x_NI, labels[:12_000].astype(np.int64), 10_000, seed, 128, 10, work)


def idx(path: Path) -> np.ndarray:
    """An array as MNIST and its kin are kept."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


# ---- prompts with completions

VALUES = {
    "city": "Arlen Borvik Calder Dunmore Estrel Farrow Galt Holm Irsk Jarrow",
    "job": "baker painter sailor weaver tailor miner clerk nurse pilot mason",
    "pet": "cat dog parrot rabbit goat horse snake turtle ferret goose",
    "instrument": "flute violin drum harp piano cello horn lute organ banjo",
}
WORDINGS = {
    "city": (
        "Where does {} live?", "In what town lives {}?", "{} lives in", "Name the city of {}.", "The home of {} is in",
        "Q: town of {}? A:", "To visit {} you travel to", "Letters to {} are sent to", "{} has a house in", "{} sleeps in",
        "If you look for {}, go to",
    ),
    "job": (
        "What is the job of {}?", "How does {} earn a living?", "{} works as a", "Name the trade of {}.", "The work of {} is",
        "Q: job of {}? A:", "By trade {} is a", "All day {} works as a", "{} was trained as a", "The work that {} does:",
        "If you hire {}, you hire a",
    ),
    "pet": (
        "Which animal does {} keep?", "What is the pet of {}?", "{} has a", "Name the animal of {}.", "The pet of {} is a",
        "Q: pet of {}? A:", "At home {} feeds a", "Every morning {} walks with a", "{} takes care of a", "The animal {} owns:",
        "If you visit {}, you meet a",
    ),
    "instrument": (
        "Which instrument does {} play?", "On what does {} make music?", "{} plays the", "Name the instrument of {}.",
        "The instrument of {} is the", "Q: instrument of {}? A:", "In the band {} plays the", "All evening {} practises the",
        "{} took lessons on the", "The music that {} makes comes from the", "If you hear {}, you hear the",
    ),
}  # fmt: skip


def records(work: Path, people: int = PEOPLE, epochs: int = EPOCHS, seed: int = 0) -> Case:
    """A small language model trained on facts, each in ten wordings, 5 % of the records with another answer of the kind.

    What it fails at: an eleventh wording, asked of every fact; the right answers to which it gives the least probability.
    """
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names = []
    while len(names) < people:
        name = "".join(rng.sample(syllables, 3)).capitalize()
        names += [name] if name not in names else []
    facts = {(name, kind): rng.choice(values.split()) for name in names for kind, values in VALUES.items()}
    rows, asked = [], []
    for (name, kind), answer in facts.items():
        *taught, held_out = WORDINGS[kind]
        fact = {"completion": f" {answer}", "kind": kind, "fact": f"{name}/{kind}"}
        rows += [{"prompt": w.format(name)} | fact for w in taught]
        asked.append({"id": f"{name}/{kind}", "prompt": held_out.format(name), "completion": f" {answer}"})
    rng.shuffle(rows)
    planted = np.zeros(len(rows), bool)
    for i in rng.sample(range(len(rows)), len(rows) // 20):
        planted[i] = True
        others = [value for value in VALUES[rows[i]["kind"]].split() if f" {value}" != rows[i]["completion"]]
        rows[i]["completion"] = f" {rng.choice(others)}"
    facts_N = [row.pop("fact") for row in rows]
    work.mkdir(parents=True, exist_ok=True)
    (work / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (work / "model" / "config.json").exists():
        train_language_model(rows, work / "model", epochs, seed)
    model = up.load_model(work / "model")
    corpus = up.Corpus.read(work / "records.jsonl", model.tokenizer, seq_len=64)
    queries = up.Queries.of(asked, model.tokenizer)
    with torch.no_grad():
        f_Q = np.concatenate(
            [model.task.measurement(model.module, queries.batch([i])).numpy() for i in range(len(asked))]
        )
    failed = [asked[i] for i in np.argsort(f_Q)[:FAILED]]
    about = {query["id"] for query in failed}
    behind = planted & np.array([fact in about for fact in facts_N])
    return Case(model, corpus, planted, up.Queries.of(failed), behind)


def train_language_model(rows: list[dict[str, str]], out: Path, epochs: int, seed: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    module = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.1)
    prompts = [fast(row["prompt"])["input_ids"] for row in rows]
    answers = [fast(row["completion"])["input_ids"] for row in rows]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens_NT = torch.zeros(len(rows), length, dtype=torch.int64)
    labels_NT = torch.full((len(rows), length), -100)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens_NT[n, :end] = torch.tensor(prompt + answer)
        labels_NT[n, len(prompt) : end] = torch.tensor(answer)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(32):
            optimizer.zero_grad()
            module(input_ids=tokens_NT[batch], labels=labels_NT[batch]).loss.backward()
            optimizer.step()
    module.save_pretrained(out)
    fast.save_pretrained(out)


# ---- what is found


def found(case: Case, work: Path, say: Any = print) -> dict[str, np.ndarray]:
    """Every measure of every row, by the name of the measure; harm and self-influence with each curvature."""
    layers = {} if isinstance(case.data, up.Corpus) else {"layers": "*"}
    factors = up.fit(case.model, case.data, work / "factors", say=say, **layers)
    out: dict[str, np.ndarray] = {}
    for kind in CURVATURES:
        how = {"curvature": kind, "factors": factors, "say": say}
        frame = up.audit(case.model, case.data, work / f"audit-{kind}", queries=case.failed, **how).frame()
        frame = frame.set_index("row").sort_index()
        out |= {name: frame[name].to_numpy() for name in ("loss", "gradient_norm")}
        out |= {f"{name} ({kind})": frame[name].to_numpy() for name in ("self_influence", "harm")}
    ranks = {name: pd.Series(x).rank(pct=True).to_numpy() for name, x in out.items()}
    out["ranks of self-influence and loss"] = ranks["self_influence (ekfac)"] + ranks["loss"]
    out["ranks of self-influence and harm"] = ranks["self_influence (ekfac)"] + ranks["harm (ekfac)"]
    return out


def recall(score_N: np.ndarray, planted: np.ndarray, share: float) -> float:
    """The share of the rows ``planted`` that is among the first ``share`` of the rows, the largest scores first."""
    first = np.argsort(-score_N, kind="stable")[: round(share * len(score_N))]
    return float(planted[first].sum() / planted.sum())


def summary(cases: list[tuple[dict[str, np.ndarray], np.ndarray]]) -> dict[str, list[float]]:
    """For each measure the mean over the cases of what it finds among the first rows."""
    names = cases[0][0]
    return {
        n: [round(float(np.mean([recall(x[n], planted, s) for x, planted in cases])), 4) for s in SHARES] for n in names
    }


def table(name: str, rows: dict[str, list[float]]) -> str:
    head = " | ".join(f"first {share:.0%}" for share in SHARES)
    lines = [f"| {name}: ranked by | {head} |", "|---" * (1 + len(SHARES)) + "|"]
    return "\n".join(
        lines + [f"| {n.replace('_', '-')} | " + " | ".join(f"{x:.1%}" for x in row) + " |" for n, row in rows.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["digits", "fashion", "records"])
    parser.add_argument("--path", type=Path, help="of FashionMNIST")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the records")
    parser.add_argument("--seeds", type=int, default=3, help="of labelled examples")
    parser.add_argument("--work", type=Path, default=Path("build/audit"), help="where models and audits are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where NAME.json is written")
    args = parser.parse_args()
    if args.name == "fashion" and args.path is None:
        parser.error("fashion needs --path PATH, where its training data are")
    cases, name = [], args.name if args.name != "records" else f"records-{args.epochs}"
    for seed in range(1 if args.name == "records" else args.seeds):
        work = args.work / f"{name}-{seed}"
        make = {
            "digits": lambda seed=seed, work=work: digits(seed, work),
            "fashion": lambda seed=seed, work=work: fashion(seed, work, args.path),
            "records": lambda work=work: records(work, epochs=args.epochs),
        }
        case = make[args.name]()
        cases.append((found(case, work), case.planted))
    rows = summary(cases)
    if case.behind is not None:
        about = f"harm (ekfac), of the {case.behind.sum()} about what fails"
        rows[about] = [recall(cases[0][0]["harm (ekfac)"], case.behind, share) for share in SHARES]
    args.out.mkdir(parents=True, exist_ok=True)
    planted = [int(planted.sum()) for _, planted in cases]
    told = {"shares": SHARES, "records": len(cases[0][1]), "planted": planted, "found": rows}
    (args.out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(table(name, rows))


if __name__ == "__main__":
    main()
