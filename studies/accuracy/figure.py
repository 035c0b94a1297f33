"""Draw figure6.png and figure7.png from the results of the study, those that are there, in studies/accuracy or in FOLDER.

    python studies/accuracy/figure.py [FOLDER]

Figure 6: Pearson correlation with the proximal Bregman response, its mean over questions and their standard deviation.
Figure 7: the same against seconds, with the fit where one is needed.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
TITLES = {
    "concrete": "Concrete, perceptron (tanh)",
    "digits": "Digits, perceptron (ReLU)",
    "convolution": "Digits, convolutional",
    "fashion": "FashionMNIST, perceptron (ReLU)",
    "language": "The demo's language model",
}
# Okabe and Ito's colours, told apart by colour-blind readers; markers besides
FAMILIES = {"EK-FAC, refine": ("#009E73", "s"), "EK-FAC": ("#0072B2", "o"), "LiSSA": ("#D55E00", "^")}
OTHERS = ("0.45", "x")


def look(name: str) -> tuple[str, str]:
    return next((style for family, style in FAMILIES.items() if name.startswith(family)), OTHERS)


def accuracy(ax: Axes, told: dict[str, Any]) -> None:
    rows = list(told["rows"].items())[::-1]
    ax.barh(
        [name.removeprefix("baseline: ") for name, _ in rows], [row["pearson"] for _, row in rows],
        xerr=[row["spread"] for _, row in rows], color=[look(name)[0] for name, _ in rows], height=0.7,
        error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
    )  # fmt: skip
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_xlim(-0.4, 1.05)
    ax.set_xlabel("Pearson with the PBRF")
    ax.tick_params(axis="y", labelsize=7)


def price(ax: Axes, told: dict[str, Any]) -> None:
    rows = {name: row for name, row in told["rows"].items() if not name.startswith("baseline")}
    for name, row in rows.items():
        color, marker = look(name)
        ax.plot(max(row["seconds"], 1e-3), row["pearson"], marker, color=color, markersize=5)
        short = re.sub(r"(EK-FAC, |LiSSA, | steps|gradient | \(identity\))", "", name)
        ax.annotate(short, (max(row["seconds"], 1e-3), row["pearson"]), (3, 3), textcoords="offset points", fontsize=6)
    lissa = [row for name, row in rows.items() if name.startswith("LiSSA")]
    ax.plot([r["seconds"] for r in lissa], [r["pearson"] for r in lissa], color=FAMILIES["LiSSA"][0], linewidth=0.8)
    ax.set(
        xscale="log", xlabel=f"seconds for {told['asked']} questions", ylabel="Pearson with the PBRF", ylim=(-0.1, 1.05)
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    found = {x: json.loads((folder / f"{x}.json").read_text()) for x in TITLES if (folder / f"{x}.json").exists()}
    for file, draw, height in (("figure6.png", accuracy, 4.6), ("figure7.png", price, 3.4)):
        figure, axes = plt.subplots(
            -(-len(found) // 2), 2, figsize=(10, height * -(-len(found) // 2)), layout="constrained", squeeze=False
        )
        for ax in axes.flat[len(found) :]:
            ax.remove()
        for ax, (name, told) in zip(axes.flat, found.items(), strict=False):
            draw(ax, told)
            ax.set_title(TITLES[name], fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / file, dpi=120)


if __name__ == "__main__":
    main()
