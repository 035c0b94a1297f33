"""How well do scores rank what retrained models do?  The linear datamodelling score of every solver on scikit-learn's digits.

    python studies/lds/study.py              # 300 trainings, then the table of the README; goes on where it was stopped
    python studies/lds/study.py --reduced    # the same in seconds, too small to say anything

Another process with the same command and ``--only-train``, at the same time, takes part in the trainings.
Axes: N training examples, Q questions (log-probabilities of the right labels of test examples), S subsets.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import upriver as up

SOLVERS = {  # name -> (what a trace is told, whether it divides by a damped curvature)
    "gradient dot product (identity)": ({"curvature": "identity"}, False),
    "K-FAC": ({"curvature": "kfac"}, True),
    "EK-FAC": ({"curvature": "ekfac"}, True),
    "EK-FAC, `--refine 3`": ({"curvature": "ekfac", "refine": 3}, True),
    "EK-FAC, `--refine 10`": ({"curvature": "ekfac", "refine": 10}, True),
    "exact Gauss-Newton": ({"curvature": "exact"}, True),
}
RELATIVE = "0.1x"


class Setup(NamedTuple):
    N: int
    Q: int
    hidden: int
    subsets: int
    seeds: int
    recipe: up.Recipe

    @property
    def damping(self) -> str:
        """The weight decay of the training, which plays the part of the damping in the loss's own optimum."""
        return str(self.recipe.weight_decay)


TRAINED = {"optimizer": "sgd", "rate": 0.05, "weight_decay": 1e-3, "decay": "linear"}
FULL = Setup(1000, 40, 32, 100, 3, up.Recipe(steps=500, batch=100, **TRAINED))
REDUCED = Setup(120, 8, 8, 10, 1, up.Recipe(steps=40, batch=40, **TRAINED))


class Digits(NamedTuple):
    train: up.Examples
    asked: up.Measurements
    trainer: up.Trainer

    @classmethod
    def of(cls, setup: Setup) -> "Digits":
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.data))
        x, y = torch.tensor(digits.data[order] / 16.0), torch.tensor(digits.target[order])
        train, rest = (
            up.Examples({"x": x[at], "y": y[at]}) for at in (slice(setup.N), slice(setup.N, setup.N + setup.Q))
        )
        return cls(train, up.Measurements(rest), up.Trainer(partial(fresh, setup.hidden), train, setup.recipe))


def fresh(hidden: int) -> up.Model:
    """A perceptron with one hidden layer, drawn by torch's seed."""
    net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)).double()
    return up.Model(net, task=up.Classification())


class Row(NamedTuple):
    """A line of the table: scores ``[N, Q]`` at each damping (of what has none, the same), and what they took."""

    scores: dict[str, np.ndarray]
    seconds: float


def traced(setup: Setup, digits: Digits, model: up.Model, work: Path) -> dict[str, Row]:
    """Every solver through one and the same trace, at full rank."""
    start = time.perf_counter()
    factors = up.fit(model, digits.train, work / "factors", layers="*", max_tokens=None)
    fitted = time.perf_counter() - start
    rows = {}
    for name, (told, damped) in SOLVERS.items():
        how = {"damping": f"{RELATIVE},{setup.damping}"} if damped else {}
        out, given = (
            work / "scores" / "-".join(map(str, told.values())),
            None if told["curvature"] == "exact" else factors,
        )
        start = time.perf_counter()
        result = up.trace(
            model, digits.train, digits.asked, given, out, layers="*", rank="full", top=1, held_out=0, **told, **how
        )
        seconds = time.perf_counter() - start + (fitted if told["curvature"] in ("ekfac", "kfac") else 0)
        frame, ids = result.frame().sort_values("sequence"), digits.asked.ids
        ends = {RELATIVE: "", setup.damping: f"@{setup.damping}"} if damped else {"": ""}
        rows[name] = Row({d: frame[[f"{x}{end}" for x in ids]].to_numpy() for d, end in ends.items()}, seconds)
    return rows


def baselines(setup: Setup, digits: Digits, model: up.Model) -> dict[str, Row]:
    """Scores that know of no curvature; some not even of the question."""
    layers = up.tracked_layers(model, digits.train, "*")
    g_NP, q_QP = (
        torch.cat([g.flatten(1) for g in up.gradients(model, layers, of).values()], 1)
        for of in (up.Measurements(digits.train), digits.asked)
    )
    with torch.no_grad():
        f_N = model.task.measurement(model.module, digits.train.batch(np.arange(setup.N)))
        h_NH, h_QH = (model.module[:2](x.inputs["x"]) for x in (digits.train, digits.asked.examples))  # type: ignore
    found = {
        "cosine of gradients": cosine(g_NP, q_QP),
        "cosine of hidden states": cosine(h_NH, h_QH),
        "loss": (-f_N)[:, None].expand(-1, setup.Q),
        "gradient norm": g_NP.norm(dim=1)[:, None].expand(-1, setup.Q),
        "random": torch.randn(setup.N, setup.Q, generator=torch.Generator().manual_seed(0)),
    }
    return {name: Row({"": scores_NQ.double().numpy()}, 0.0) for name, scores_NQ in found.items()}


def cosine(x_NP: Tensor, y_QP: Tensor) -> Tensor:
    return nn.functional.normalize(x_NP, dim=1) @ nn.functional.normalize(y_QP, dim=1).T


def trained(setup: Setup, digits: Digits, work: Path) -> up.Bank:
    subsets = up.random_subsets(setup.N, setup.subsets)
    return up.retrain(digits.trainer, subsets, digits.asked, work / "bank", seeds=range(setup.seeds))


def study(setup: Setup, work: Path) -> tuple[up.Bank, dict[str, Row]]:
    """Train the bank, then score by every solver, on the model of the first seed that saw all examples."""
    digits = Digits.of(setup)
    bank = trained(setup, digits, work)
    start = time.perf_counter()
    meta = up.metagradients(digits.trainer, digits.asked)
    rows = {"metagradient, of one training": Row({"": meta.nats_NQ}, time.perf_counter() - start)}
    start = time.perf_counter()
    others = [up.metagradients(digits.trainer, digits.asked, seed).nats_NQ for seed in range(1, setup.seeds)]
    seconds = time.perf_counter() - start + rows["metagradient, of one training"].seconds
    if others:
        rows["metagradient, mean of the seeds"] = Row({"": np.mean([meta.nats_NQ, *others], axis=0)}, seconds)
    return bank, rows | traced(setup, digits, meta.model, work) | baselines(setup, digits, meta.model)


def table(setup: Setup, bank: up.Bank, rows: dict[str, Row]) -> str:
    """For the README: each row at both dampings; at the second, what it is above EK-FAC, and by the median over seeds."""
    heads = [
        "scores",
        f"LDS, damping {RELATIVE}",
        f"LDS, damping {setup.damping}",
        "above EK-FAC",
        "by the median (QLD)",
        "seconds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    last = {name: list(row.scores.values())[-1] for name, row in rows.items()}
    base_Q = up.lds(bank, last["EK-FAC"]).each_Q
    for name, row in rows.items():
        first, second = up.lds(bank, next(iter(row.scores.values()))), up.lds(bank, last[name])
        cells: list[Any] = [name, first, second if len(row.scores) > 1 else "the same"]
        cells += [above(second.each_Q - base_Q), up.lds(bank, last[name], quantile=0.5)]
        lines.append(f"| {' | '.join(map(str, cells))} | {f'{row.seconds:.1f}' if row.seconds else ''} |")
    return "\n".join(lines)


def above(difference_Q: np.ndarray) -> str:
    """A mean over questions with the bootstrap's interval: paired, so narrower than those of the two scores."""
    drawn = np.random.default_rng(0).integers(len(difference_Q), size=(2000, len(difference_Q)))
    low, high = np.quantile(difference_Q[drawn].mean(1), [0.025, 0.975])
    return f"{difference_Q.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="a few small trainings")
    parser.add_argument("--only-train", action="store_true", help="take part in the trainings; ends when all are there")
    parser.add_argument(
        "--work", type=Path, default=Path("build/lds"), help="where the bank, factors and scores are kept"
    )
    args = parser.parse_args()
    setup = REDUCED if args.reduced else FULL
    work = args.work / ("reduced" if args.reduced else "full")
    work.mkdir(parents=True, exist_ok=True)
    if args.only_train:
        trained(setup, Digits.of(setup), work)
    else:
        print(table(setup, *study(setup, work)))


if __name__ == "__main__":
    main()
