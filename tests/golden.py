"""Scores, eigenvalues and tops of a few small models and of a slice of the demo, kept in ``fixtures/golden.npz``.

    python tests/golden.py           # what is computed now, against what is kept: the largest difference of each
    python tests/golden.py --write   # keep what is computed now; only for a change that is meant to move numbers

All numbers are made through the public interface, so they stand while the inside is rebuilt.
"""

import lzma
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import upriver as up

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # as the command line sets it, before anything is loaded

KEPT = Path(__file__).parent / "fixtures" / "golden.npz"
DEMO = Path(up.__file__).parent / "demo"
MODELS = ("llama", "gpt2", "shared", "classifier", "regressor")
KINDS = ("ekfac", "kfac", "diagonal", "identity")
SPEECHES = 4  # of the demo's corpus

Numbers = dict[str, np.ndarray]


def run(model: Any, data: Any, queries: Any, folder: Path, fit: dict[str, Any], traces: dict[str, dict]) -> Numbers:
    """``lam`` by layer, and for each trace the scores ``[N, Q]`` and the sequences of the top."""
    factors = up.fit(model, data, folder / "factors", **fit)
    found = {f"lam {x.name}": factors.block(x.name).lam_OI.numpy() for x in factors.layers}
    for name, options in traces.items():
        scores = up.trace(model, data, queries, factors, folder / name, **options)
        found[f"{name} scores"] = scores.frame().sort_values("sequence")[queries.ids].to_numpy()
        tops = [scores.top(q, 3, side)["sequence"].to_numpy() for q in queries.ids for side in ("positive", "negative")]
        found[f"{name} top"] = np.concatenate(tops)
    return found


def small(name: str, folder: Path) -> Numbers:
    """One of the models of ``cases.py``, in float64, with every curvature of a fit, at full and at low rank."""
    from cases import case

    c = case(name)
    traces: dict[str, dict] = {
        kind: {"curvature": kind, "rank": "full", "top": 3, "batch_tokens": 30} for kind in KINDS
    }
    traces["rank 2"] = {"rank": 2, "top": 3, "batch_tokens": 30, "damping": "0.01x"}
    return run(c.model, c.data, c.queries, folder, {"layers": c.spec, "dtype": "float64", "batch_tokens": 30}, traces)


def demo(folder: Path) -> Numbers:
    """The first speeches of the demo, in float32, at the rank of the demo; a sixteenth of two ``lam``."""
    with lzma.open(DEMO / "speeches.jsonl.xz", "rt") as speeches:
        lines = [line for _, line in zip(range(SPEECHES), speeches, strict=False)]
    (folder / "speeches.jsonl").write_text("".join(lines))
    model = up.load_model(DEMO / "speech-model")
    corpus = up.Corpus.read(folder / "speeches.jsonl", model.tokenizer, seq_len=128)
    queries = up.Queries.read(DEMO / "queries.jsonl").bound(model.tokenizer)
    found = run(model, corpus, queries, folder, {"max_tokens": 8_000}, {"ekfac": {"top": 3, "held_out": 0}})
    lams = [name for name in found if name.startswith("lam")]
    return {name: x[::4, ::4] if name in lams else x for name, x in found.items() if name not in lams[1:-1]}


def computed() -> Numbers:
    torch.set_num_threads(1)
    found: Numbers = {}
    for name in (*MODELS, "demo"):
        with tempfile.TemporaryDirectory() as folder:
            numbers = demo(Path(folder)) if name == "demo" else small(name, Path(folder))
        found |= {f"{name}: {key}": value for key, value in numbers.items()}
    return found


def difference(found: np.ndarray, kept: np.ndarray) -> float:
    """The largest difference, as a share of the range of what is kept."""
    return float(
        np.abs(found.astype(np.float64) - kept).max() / max(float(np.ptp(kept)), float(np.abs(kept).max()), 1e-300)
    )


def main() -> None:
    found = computed()
    if "--write" in sys.argv:
        np.savez_compressed(KEPT, **{name: x.astype(np.float32) if "lam" in name else x for name, x in found.items()})
        return
    kept = np.load(KEPT)
    for name in kept.files:
        print(f"{difference(found[name], kept[name]):9.1e}  {name}")


if __name__ == "__main__":
    main()
