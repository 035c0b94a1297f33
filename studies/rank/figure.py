"""Draw figure.png from demo.json and smollm2.json, those that are there, in studies/rank or in FOLDER.

    python studies/rank/figure.py [FOLDER]

One row per model.  Left: the scores of one query at rank 32 against those at full rank.  Right: how far the correlation with
the full-rank scores is from 1, by rank and by length of the query.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

HERE = Path(__file__).parent
TITLES = {"demo": "Demo model, 2.6M parameters", "smollm2": "SmolLM2-135M"}
KINDS = {  # Okabe and Ito's blue and vermilion: told apart by colour-blind readers, and by line and marker besides
    "plain": {"color": "#D55E00", "line": "--", "marker": "x", "label": "plain SVD"},
    "weighted": {"color": "#0072B2", "line": "-", "marker": "o", "label": "weighted by the curvature"},
}
TARGET, RANKS_SHOWN = 0.99, (1, 2, 4, 8, 16, 32, 64, 128)


def scatter(ax: Axes, found: dict[str, Any]) -> None:
    example = found["example"]
    full = np.array(example["full"])
    scale = 10.0 ** np.floor(np.log10(np.abs(full).max()))
    for kind, style in KINDS.items():
        r = np.corrcoef(example[kind], full)[0, 1]
        y = np.array(example[kind]) / scale
        label = f"{style['label']}: r = {r:.3f}"
        ax.plot(
            full / scale,
            y,
            style["marker"],
            color=style["color"],
            label=label,
            markersize=4.5,
            fillstyle="none",
            alpha=0.8,
        )
    ends = [full.min() / scale, full.max() / scale]
    ax.plot(ends, ends, color="0.5", linewidth=0.8, zorder=0)
    unit = f" ($10^{{{int(np.log10(scale))}}}$)" if scale != 1 else ""
    ax.set_xlabel(f"score at full rank{unit}")
    ax.set_ylabel(f"score at rank {example['rank']}{unit}")
    ax.set_title(f"query “{example['query']}”, {found['sequences']} sequences", fontsize=9)
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def curves(ax: Axes, found: dict[str, Any]) -> None:
    """Passages in full; the shorter queries as thin lines of their means."""
    rank = np.arange(1, len(found["passage"]["plain"]["mean"]) + 1)
    for kind, style in KINDS.items():
        for length in (x for x in ("short", "sentence") if x in found):
            mean_R = 1 - np.array(found[length][kind]["mean"])
            ax.plot(rank, mean_R, style["line"], color=style["color"], linewidth=0.7, alpha=0.7)
        band(ax, rank, found["passage"][kind], style)
    ax.axhline(1 - TARGET, color="0.35", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", yscale="log", xlim=(1, rank[-1]), xlabel="rank", ylabel="1 − correlation with full rank")
    ax.set_ylim(1e-4, 1)
    ax.xaxis.set_major_locator(FixedLocator(RANKS_SHOWN))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(map(str, RANKS_SHOWN))
    name_lengths(ax, found)
    ax.set_title("mean over queries; band: worst to best passage query", fontsize=9)
    title = f"passage queries: mean correlation {TARGET} from"
    ax.legend(
        fontsize=8, loc="lower left", framealpha=0.9, edgecolor="none", title=title, title_fontsize=8, alignment="left"
    )


def band(ax: Axes, rank: np.ndarray, of: dict[str, Any], style: dict[str, str]) -> None:
    mean_R, worst_R, best_R = (1 - np.array(of[k]) for k in ("mean", "worst", "best"))
    needed = of["needed"]
    label = f"{style['label']}: " + (f"rank {needed}" if needed else f"above rank {rank[-1]}")
    ax.fill_between(rank, best_R, worst_R, color=style["color"], alpha=0.18, linewidth=0)
    ax.plot(rank, mean_R, style["line"], color=style["color"], linewidth=2, label=label)
    if needed:
        ax.plot(needed, mean_R[needed - 1], style["marker"], color=style["color"], markersize=7, fillstyle="none")


def name_lengths(ax: Axes, found: dict[str, Any], level: float = 0.025) -> None:
    """Each group's name on its curves, where the weighted one falls through ``level``."""
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1}
    for length in (x for x in ("short", "sentence", "passage") if x in found):
        mean_R = 1 - np.array(found[length]["weighted"]["mean"])
        at = int(np.argmax(mean_R < level))
        ax.text(max(at + 1, 1.4), mean_R[at], length, ha="center", va="center", fontsize=8, bbox=box)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    names = [name for name in TITLES if (folder / f"{name}.json").exists()]
    figure, axes = plt.subplots(len(names), 2, figsize=(9, 3.9 * len(names)), layout="constrained", squeeze=False)
    for row, name in zip(axes, names, strict=True):
        found = json.loads((folder / f"{name}.json").read_text())
        scatter(row[0], found)
        curves(row[1], found)
        row[0].annotate(
            TITLES[name], (0, 1), (0, 22), "axes fraction", textcoords="offset points", fontsize=11, weight="bold"
        )
        for ax in row:
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "figure.png", dpi=150)


if __name__ == "__main__":
    main()
