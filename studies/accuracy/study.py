"""How near does every solver come to the truth, and at what price?  Figures 6 and 7 of Grosse et al. 2023 (arXiv 2308.03296).

    python studies/accuracy/study.py concrete digits convolution language
    python studies/accuracy/study.py fashion --fashion fashion-mnist.npz      # arrays train_images, train_labels, t10k_...
    python studies/accuracy/study.py digits --reduced                        # seconds, too small to say anything

Each task trains its model, asks about some test examples (their log-probability, or minus half the squared error), computes
the proximal Bregman response and the scores of every solver, and writes ``NAME.json`` into ``--out``; what is finished is
kept under ``--work`` and is not done again.  All solvers and the truth have one and the same damping.  Seconds are those of the
processor, with one thread.

The truth is computed from the side of the questions.  ``G + lambda I`` is symmetric, so ``d f(q) / d eps`` where the loss of
``z`` is tilted by ``eps`` is ``- d L(z) / d eps`` where that of ``q`` is, ``f(q)`` being ``- L(q)``: one minimisation for
each sign and question serves all training examples.
Axes: N training examples that are scored, Q questions, P tracked weights.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import upriver as up
from upriver.curvature.base import Grads
from upriver.curvature.choose import solver
from upriver.curvature.diagonal import fit_diagonal
from upriver.curvature.iterative import Neumann
from upriver.curvature.products import Products, Tracked
from upriver.evaluate.pbrf import ProximalBregman
from upriver.text.batch import Batch, Sequences

HERE = Path(__file__).parent
COPIES = 0.001  # of the example that the truth adds and takes away
RESIDUAL = 1e-3  # of the truth's own gradient, and the tolerance of conjugate gradients is a tenth of it
DRAWN = 128  # examples in each step of LiSSA and ASTRA, or a quarter of those that there are
FRACTIONS = (1.0, 0.3, 0.1, 0.03)  # of one over the largest eigenvalue: steps that LiSSA is tuned over
BASELINES = ("cosine", "repsim", "loss", "gradient_norm", "random")


class Setup(NamedTuple):
    """How much of everything: examples to train on and to score, questions, training steps, steps and ranks of solvers."""

    train: int
    scored: int
    asked: int
    hidden: int
    steps: int
    lissa: tuple[int, ...]
    rank: int = 100
    astra: int = 100
    damping: str = "0.01"  # or a multiple of the mean of all eigenvalues of EK-FAC, such as 0.1x


class Case(NamedTuple):
    """A trained model, what the curvature is of, what is asked, and how ``layers`` and the fit are told."""

    model: up.Model
    data: Sequences
    asked: Any
    layers: str
    fit: dict[str, Any]
    backward: int  # passes that the fit takes of every example


class Rows:
    """Some sequences as questions: what they measure is asked of each."""

    def __init__(self, data: Sequences, rows: np.ndarray):
        self.data, self.rows = data, rows
        self.ids, self.lengths = [f"z{row}" for row in rows], np.asarray(data.lengths_N)[rows]
        self.fingerprint = f"{data.fingerprint}-rows"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any) -> Batch:
        return replace(self.data.batch(self.rows[np.asarray(indices)]), query_N=np.asarray(indices))


# ---- tasks


def perceptron(inputs: int, hidden: int, outputs: int, act: Callable[[], nn.Module], task: up.Task) -> up.Model:
    net = nn.Sequential(nn.Linear(inputs, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, outputs))
    return up.Model(net.double(), task=task)


def convolutional(hidden: int, task: up.Task) -> up.Model:
    """Two convolutions over 8 x 8 pixels and a linear layer."""
    net = nn.Sequential(
        nn.Conv2d(1, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, 2 * hidden, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * hidden, 10),
    )  # fmt: skip
    return up.Model(net.double(), task=task)


def trained(
    begin: Callable[[], up.Model], x: np.ndarray, y: np.ndarray, setup: Setup, rate: float, backward: int
) -> Case:
    """Train on the first rows, in an order of their own, to the end of a falling rate; ask about the next."""
    order = np.random.default_rng(0).permutation(len(x))[: setup.train + setup.asked]
    x_NI, y_N = torch.tensor(x[order]), torch.tensor(y[order])
    train, rest = (up.Examples({"x": x_NI[at], "y": y_N[at]}) for at in (slice(setup.train), slice(setup.train, None)))
    recipe = up.Recipe(
        steps=setup.steps, rate=rate, batch=min(128, setup.train), optimizer="sgd", weight_decay=1e-4, decay="linear"
    )
    model = up.Trainer(begin, train, recipe)(np.arange(setup.train), 0)
    return Case(model, train, up.Measurements(rest), "*", {"fisher": "exact", "dtype": "float64"}, backward)


def concrete(setup: Setup, args: argparse.Namespace) -> Case:
    table = np.loadtxt(HERE / "concrete.csv", delimiter=",", skiprows=1)
    table = (table - table.mean(0)) / table.std(0)
    begin = partial(perceptron, 8, setup.hidden, 1, nn.Tanh, up.Regression())
    return trained(begin, table[:, :8], table[:, 8], setup, 0.03, 1)


def digits(setup: Setup, args: argparse.Namespace) -> Case:
    x, y = loaded_digits()
    return trained(partial(perceptron, 64, setup.hidden, 10, nn.ReLU, up.Classification()), x, y, setup, 0.005, 10)


def convolution(setup: Setup, args: argparse.Namespace) -> Case:
    x, y = loaded_digits()
    begin = partial(convolutional, setup.hidden, up.Classification())
    return trained(begin, x.reshape(-1, 1, 8, 8), y, setup, 0.01, 10)


def loaded_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x - x.mean()) / x.std(), y  # type: ignore


def fashion(setup: Setup, args: argparse.Namespace) -> Case:
    """Images of half the width and height, each pixel the mean of four."""
    with np.load(args.fashion) as found:
        images, y = found["train_images"][:5000], found["train_labels"][:5000]
    x = (images / 255.0).reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
    begin = partial(perceptron, 196, setup.hidden, 10, nn.ReLU, up.Classification())
    return trained(begin, (x - x.mean()) / x.std(), y.astype(np.int64), setup, 0.005, 10)


def language(setup: Setup, args: argparse.Namespace) -> Case:
    """The demo's model, and random windows of 32 tokens of its speeches for all that it is taken to be trained on."""
    demo = Path(str(resources.files("upriver") / "demo"))
    model = up.load_model(demo / "speech-model", dtype="float64")
    whole = up.Corpus.read(demo / "speeches.jsonl.xz", model.tokenizer, seq_len=32, cache=args.work / "cache")
    rows = np.random.default_rng(0).choice(len(whole), setup.train, replace=False)
    path = args.work / f"windows-{setup.train}.jsonl"
    path.write_text("".join(json.dumps({"text": whole.text(int(row))}) + "\n" for row in rows))
    data = up.Corpus.read(path, model.tokenizer, seq_len=40, cache=args.work / "cache")
    lines = (demo / "queries.jsonl").read_text().splitlines()[: setup.asked]
    asked = up.Queries.of([json.loads(line) for line in lines], model.tokenizer)
    return Case(model, data, asked, "mlp", {"draws": 4, "dtype": "float64"}, 4)


FEW = Setup(80, 40, 3, 8, 60, (5, 20), 10, 5)
TASKS: dict[str, tuple[Callable[[Setup, argparse.Namespace], Case], Setup, Setup]] = {  # full (20 epochs), reduced
    "concrete": (concrete, Setup(900, 500, 10, 128, 140, (10, 30, 100, 300, 1000), astra=200), FEW),
    "digits": (digits, Setup(500, 500, 10, 256, 78, (10, 30, 100, 500)), FEW),
    "convolution": (
        convolution, Setup(1000, 500, 10, 8, 156, (10, 30, 100, 300), astra=200), Setup(60, 30, 2, 1, 40, (5, 20), 10, 5),
    ),
    "fashion": (fashion, Setup(500, 500, 10, 256, 78, (10, 30, 100, 500)), FEW),
    "language": (
        language, Setup(12, 12, 2, 0, 0, (3, 10), 10, 10, "0.1x"), Setup(4, 4, 2, 0, 0, (2,), 2, 2, "0.1x"),
    ),
}  # fmt: skip


# ---- one task


class Study:
    """What the solvers of one task share."""

    def __init__(self, name: str, setup: Setup, case: Case, work: Path):
        self.name, self.setup, self.case, self.work = name, setup, case, work
        self.drawn = min(DRAWN, -(-len(case.data) // 4))
        self.rows = np.sort(np.random.default_rng(1).permutation(len(case.data))[: setup.scored])
        start = time.process_time()
        self.factors = up.fit(case.model, case.data, work / "factors", layers=case.layers, max_tokens=None, **case.fit)
        self.fitting = self.timed("fit", lambda: {"seconds": time.process_time() - start})["seconds"]
        self.layers = up.tracked_layers(case.model, case.data, case.layers)
        lam = [self.factors.block(x.name).lam_OI.double() for x in self.layers]
        told = up.Damping.parse(setup.damping)
        self.damping = up.Damping(told.of(float(sum(x.sum() for x in lam)) / sum(x.numel() for x in lam)), False)
        self.q = up.gradients(case.model, self.layers, case.asked)
        self.g_NP = self.gradients()

    def gradients(self) -> Tensor:
        """The gradient of the loss of every scored example, ``[N, P]``."""
        f = Tracked(self.case.model, self.layers)
        with f.differentiable():
            return torch.stack([f.gradient(f.theta_P, self.case.data.batch([row])) for row in self.rows])  # type: ignore

    def timed(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` gives with the seconds of the processor that it took, kept in a file of this name."""
        path = self.work / f"{name.replace('/', '-').replace(' ', '-')}.json"
        if not path.exists():
            start = time.process_time()
            found = {"seconds": 0.0} | make()
            found["seconds"] = found["seconds"] or time.process_time() - start
            path.write_text(json.dumps(found))
            print(f"{self.name}: {name}: {found['seconds']:.1f} s", flush=True)
        return json.loads(path.read_text())

    def product(self) -> Products:
        return Products(self.case.model, self.layers, self.case.data)

    def scores(self, v: Grads) -> list[list[float]]:
        """``I_f(z) = - v . grad L(z)``, ``[N, Q]``."""
        v_QP = torch.cat([v[x.name].flatten(1) for x in self.layers], 1).to(self.g_NP)
        return (-self.g_NP @ v_QP.T).tolist()

    def solved(self, kind: str, damping: up.Damping | None = None, **how: Any) -> dict[str, Any]:
        """Scores of a solver, and what it multiplied: sequences through a product with the curvature."""
        case, N = self.case, len(self.case.data)
        own = solver(kind, case.model, self.layers, case.data, np.arange(N), self.factors, **how)
        return self._told(own, damping or self.damping)

    def converged(self) -> dict[str, Any]:
        """Conjugate gradients to a tenth of what the truth may leave, which begins there: the solution is kept."""
        case, N = self.case, len(self.case.data)
        how = {"steps": 3000, "tolerance": RESIDUAL / 10}
        own = solver("cg", case.model, self.layers, case.data, np.arange(N), self.factors, **how)
        return self._told(own, self.damping, self.work / "solution.pt")

    def lissa(self, steps: int, step: float) -> dict[str, Any]:
        return self._told(Neumann(self.product(), step=step, steps=steps, sequences=self.drawn), self.damping)

    def _told(self, own: up.Curvature, damping: up.Damping, keep: Path | None = None) -> dict[str, Any]:
        solution = own.solve(self.q, damping)
        if keep:
            torch.save(solution.value, keep)
        product = getattr(own, "product", None)
        told = {key: solution.stats[key] for key in ("steps", "why", "step") if key in solution.stats}
        return {
            "scores": self.scores(solution.value), "converged": solution.converged,
            "residual": max(solution.stats.get("residual", [0.0])),
            "operations": 0 if product is None else round(product.done * len(self.case.data)),
        } | told  # fmt: skip

    def diagonal(self) -> dict[str, Any]:
        fit_diagonal(self.case.model, self.case.data, self.factors)
        return self.solved("diagonal")

    def tuned(self) -> dict[str, Any]:
        """The step with which 100 steps of LiSSA leave the least, among shares of one over the largest eigenvalue."""
        largest = self._told(Neumann(self.product(), steps=1), self.damping)["step"]
        few = min(100, self.setup.lissa[-1])
        tried = {share * largest: self.lissa(few, share * largest)["residual"] for share in FRACTIONS}
        return {"step": min(tried, key=lambda step: tried[step] if tried[step] == tried[step] else np.inf)}

    def truth(self, exact: dict[str, Tensor]) -> dict[str, Any]:
        """The proximal Bregman response of every scored example on every question, ``[N, Q]``, and what is left of its slope.

        Args:
            exact: the solution of conjugate gradients, from which the minimisation goes on.
        """
        case, found, left = self.case, [], []
        p = ProximalBregman(case.model, self.layers, case.data, self.damping.value, tolerance=RESIDUAL)
        for q in range(len(case.asked)):
            start = {name: v[q : q + 1] for name, v in exact.items()}
            response = p.influence(case.asked.batch([q]), Rows(case.data, self.rows), COPIES / p.N, start)
            found.append(response.value_Q.tolist())
            left.append(response.stats["gradient"])
        return {"scores": np.array(found).T.tolist(), "gradient": max(left)}

    def direct(self, few: int) -> dict[str, Any]:
        """The same by its definition, from nothing: some training examples tilted, the questions measured."""
        case = self.case
        p = ProximalBregman(case.model, self.layers, case.data, self.damping.value, tolerance=RESIDUAL)
        each = [p.influence(case.data.batch(self.rows[n : n + 1]), case.asked, COPIES / p.N) for n in range(few)]
        return {"scores": [r.value_Q.tolist() for r in each], "gradient": max(r.stats["gradient"] for r in each)}

    def baseline(self, name: str) -> dict[str, Any]:
        case = self.case
        found = up.baseline(name, case.model, case.data, case.asked, layers=case.layers)
        return {"scores": found[self.rows].tolist()}

    def run(self) -> dict[str, Any]:
        """Every row of the table."""
        made: dict[str, dict[str, Any]] = {}
        fits, N, setup = 2 * self.case.backward * len(self.case.data), len(self.case.data), self.setup
        plain: list[tuple[str, Callable[[], dict[str, Any]], bool]] = [
            ("gradient dot product (identity)", lambda: self.solved("identity", up.Damping(0.0, False)), False),
            ("diagonal", self.diagonal, True),
            ("K-FAC", lambda: self.solved("kfac"), True),
            ("EK-FAC", lambda: self.solved("ekfac"), True),
            *((f"EK-FAC, refine {k}", partial(self.solved, "ekfac", refine=k), True) for k in (1, 3, 10)),
            (f"Nystrom, rank {setup.rank}", lambda: self.solved("nystrom", rank=setup.rank), False),
            (f"Arnoldi, rank {setup.rank}", lambda: self.solved("arnoldi", rank=setup.rank), False),
            (f"ASTRA, {setup.astra} steps", lambda: self.solved("astra", steps=setup.astra, sequences=self.drawn), True),
            ("conjugate gradients", self.converged, True),
        ]  # fmt: skip
        for name, make, fitted in plain:
            made[name] = self.timed(name, make)
            if fitted:
                made[name]["seconds"] += self.fitting
                made[name]["operations"] += fits
        if sum(x.O * x.I for x in self.layers) <= 5000:
            made["exact Gauss-Newton"] = self.timed("exact Gauss-Newton", lambda: self.solved("exact"))
        step = self.timed("tuning", self.tuned)["step"]
        for steps in setup.lissa:
            made[f"LiSSA, {steps} steps"] = self.timed(f"LiSSA {steps}", partial(self.lissa, steps, step))
        names = (*BASELINES, "bm25") if isinstance(self.case.data, up.Corpus) else BASELINES
        for name in names:
            made[f"baseline: {name}"] = self.timed(f"baseline {name}", partial(self.baseline, name))
        truth = self.timed("truth", lambda: self.truth(torch.load(self.work / "solution.pt")))
        few = (
            self.timed("direct", lambda: self.direct(min(CHECKED[self.name], len(self.rows) // 10)))
            if self.name in CHECKED
            else None
        )
        return self.summary(made, truth, few) | {"train": N, "fit_seconds": self.fitting}

    def summary(self, made: dict[str, Any], truth: dict[str, Any], few: dict[str, Any] | None) -> dict[str, Any]:
        true_NQ, rows = np.array(truth["scores"]), {}
        for name, found in made.items():
            r_Q = pearson(np.array(found.pop("scores")), true_NQ)
            rows[name] = {
                "pearson": float(r_Q.mean()),
                "spread": float(r_Q.std()),
                "each": r_Q.round(5).tolist(),
            } | found
        told: dict[str, Any] = {
            "task": self.name, "scored": len(self.rows), "asked": len(self.case.asked), "damping": self.damping.value,
            "weights": self.g_NP.shape[1], "truth_seconds": truth["seconds"], "truth_gradient": truth["gradient"], "rows": rows,
        }  # fmt: skip
        if few is not None:
            direct = np.array(few["scores"])
            apart = np.abs(direct - true_NQ[: len(direct)]).max() / np.abs(direct).max()
            told["direct"] = {"examples": len(direct), "largest_difference": float(apart)}
        return told


CHECKED = {"concrete": 20, "convolution": 2}  # whose truth is also computed by its definition, for some examples


def pearson(x_NQ: np.ndarray, y_NQ: np.ndarray) -> np.ndarray:
    """The correlation over examples, of every question: ``[Q]``; 0 where all scores are the same or not numbers."""
    x, y = x_NQ - x_NQ.mean(0), y_NQ - y_NQ.mean(0)
    size = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    with np.errstate(all="ignore"):
        r_Q = (x * y).sum(0) / size
    return np.where(np.isfinite(r_Q), r_Q, 0.0)


def table(told: dict[str, Any]) -> str:
    head = f"{told['task']} ({told['train']:,} to train on, {told['scored']} scored, {told['asked']} asked)"
    lines = [f"| {head} | Pearson with the PBRF | seconds | sequences through the model |", "|---|---|---|---|"]
    for name, row in told["rows"].items():
        cost = f"{row['seconds']:.2f}" if not name.startswith("baseline") else ""
        lines.append(
            f"| {name} | {row['pearson']:.3f} ± {row['spread']:.3f} | {cost} | {row.get('operations', ''):,} |"
            if cost
            else f"| {name.removeprefix('baseline: ')} | {row['pearson']:.3f} ± {row['spread']:.3f} | | |"
        )
    return "\n".join([*lines, "", price(told["rows"])])


def price(rows: dict[str, dict[str, Any]]) -> str:
    """How many times EK-FAC's cost LiSSA takes to be as near to the truth, between two of its rows by the logarithm."""
    lissa, own = [row for name, row in rows.items() if name.startswith("LiSSA")], rows["EK-FAC"]
    reached = [row["pearson"] for row in lissa]
    above = next((i for i, r in enumerate(reached) if r >= own["pearson"]), None)
    told = []
    for what in ("seconds", "operations"):
        costs = [row[what] / own[what] for row in lissa]
        if above is None or above == 0:
            told.append(f"more than {costs[-1]:.1f}" if above is None else f"at most {costs[0]:.1f}")
            continue
        ends = slice(above - 1, above + 1)
        told.append(f"{np.exp(np.interp(own['pearson'], reached[ends], np.log(costs[ends]))):.1f}")
    near = f"To be as near as EK-FAC ({own['pearson']:.3f}) LiSSA takes"
    return f"{near} {told[0]} times its seconds, {told[1]} times its sequences."


def study(name: str, args: argparse.Namespace) -> dict[str, Any]:
    make, full, reduced = TASKS[name]
    work, setup = args.work / (f"{name}-reduced" if args.reduced else name), reduced if args.reduced else full
    work.mkdir(parents=True, exist_ok=True)
    told = Study(name, setup, make(setup, args), work).run()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=[*TASKS])
    parser.add_argument("--fashion", type=Path, help="the arrays of FashionMNIST, as .npz")
    parser.add_argument("--reduced", action="store_true", help="a few examples and small models")
    parser.add_argument("--out", type=Path, default=HERE, help="where NAME.json is written")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="where what is finished is kept")
    args = parser.parse_args()
    if "fashion" in args.tasks and args.fashion is None:
        parser.error("fashion needs --fashion FILE.npz, which is not part of this repository")
    for name in args.tasks:
        print(table(study(name, args)), flush=True)


if __name__ == "__main__":
    main()
