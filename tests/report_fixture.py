"""A realistic folder of results, made up: what ``upriver trace`` writes, with the texts that break pages."""

import base64
import gzip
import html.parser
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from upriver.runtime.artifact import SCHEMA, Artifact, write_json

HOSTILE = "He wrote </script><script>alert(1)</script><img src=x onerror=alert(2)> & <b>bold</b> into the record."
RTL = "وقال الرئيس إن الاتحاد قوي. שלום לכל חברי הקונגרס."
EMOJI = "The people answered with joy 🎉👩‍👩‍👧 and the café was full."
SENTENCES = """
Mr. Speaker, Mr. Vice President, Members of Congress, honored guests, and fellow citizens: our Union is strong.
We meet tonight at a moment of great promise, and of real testing, for the United States of America.
Our armed forces have answered every call, from the Middle East to the far Pacific, and they have our lasting thanks.
I ask the Congress to act this year on the budget, and to act before the summer recess.
The revenues of the Government exceeded its expenditures by more than nine millions of dollars.
Our relations with foreign powers continue on a footing of friendship and good understanding.
May God bless you, and may God bless the United States of America.
Peace in the Middle East will come only when both sides choose it, and we will stand by those who do.
Every family deserves a doctor they can reach and a school that they can trust.
The treaty with Great Britain has been ratified, and commissioners have been appointed under its sixth article.
We can cut the deficit in half and still keep our promises to the old and to the young.
It is our duty to leave to our children a land whose forests stand and whose rivers run clean.
Let us be the generation that keeps faith with those who came before us.
No nation can be secure when its neighbours are hungry; that is why we send grain as well as ships.
I have directed the Secretary of the Treasury to report to you on the state of the currency.
Unemployment is down, wages are up, and a record number of Americans went to work this morning.
The farmers of the West have suffered from drought, and their relief deserves your early attention.
There is no challenge before us that American workers, given a fair chance, cannot meet.
""".strip().splitlines()
QUERIES: list[dict[str, Any]] = [
    {
        "id": "blessing",
        "prompt": "May God bless you, and may God bless the United",
        "completion": " States of America.",
    },
    {"id": "middle-east", "prompt": "We will continue to work for peace in the Middle", "completion": " East"},
    {
        "id": "strong-weak",
        "prompt": "My fellow citizens, the state of our Union is",
        "completion": " strong.",
        "contrast": " weak and divided.",
    },
    {"id": "hostile </script>", "prompt": HOSTILE, "completion": " 🎉 قوي"},
]
SPEAKERS = ["George Washington", "Ulysses S. Grant", "Harry S. Truman", "Ronald Reagan", "Barack Obama"]
KINDS = ["gate_proj", "up_proj", "down_proj"]


def cut(text: str) -> list[str]:
    """Pieces like a tokenizer's: words of at most six letters with their space; an emoji takes several tokens."""
    tokens = []
    for piece in re.findall(r"\s?\w{1,6}|\w+|\s?[^\w\s]|\s+", text):
        tokens.append(piece)
        if ord(piece[-1]) > 0x1F000:
            tokens.append("")
    return tokens


def write_scores(
    path: Path,
    queries: int = 4,
    per_side: int = 20,
    tokens: int = 110,
    documents: int = 60,
    blocks: int = 6,
    seed: int = 0,
) -> Path:
    """Write a finished folder of results and return its path."""
    path.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    rng = np.random.default_rng(0)
    asked = [
        dict(QUERIES[i % len(QUERIES)], id=QUERIES[i]["id"] if i < len(QUERIES) else f"q{i}") for i in range(queries)
    ]
    corpus = _corpus(rng, documents, tokens)
    n = len(corpus)
    raw = {q["id"]: (rng.standard_t(2.2, n) * 8 + rng.exponential(1, n) * 3).astype(np.float32) for q in asked}
    frame = pd.DataFrame(corpus)
    scores = pd.concat([frame[["sequence", "document", "start", "end"]], pd.DataFrame(raw)], axis=1)
    scores.to_parquet(path / "scores.parquet")
    sums = scores.groupby("document", sort=False)[[q["id"] for q in asked]].sum()
    sums.insert(0, "sequences", scores.groupby("document", sort=False).size())
    sums.reset_index().to_parquet(path / "documents.parquet")
    layers = [
        {"name": f"model.layers.{b}.mlp.{k}", "shape": [512, 192], "block": b, "kind": k}
        for b in range(blocks)
        for k in KINDS
    ]
    rows = [row for q in asked for row in _top(rng, q, raw[q["id"]], corpus, per_side, len(layers), n)]
    pd.DataFrame(rows).astype({"tfidf_rank": "Int64"}).to_parquet(path / "top.parquet")
    (path / "queries.json").write_text(json.dumps([_query(rng, q) for q in asked]), encoding="utf-8")
    seal(path, **_manifest(layers, n, documents))
    return path


def _corpus(rng: np.random.Generator, documents: int, tokens: int) -> list[dict[str, Any]]:
    special = [HOSTILE, RTL, EMOJI, "x" * 100_000 + " is one token of 100 kB."]
    sequences = []
    for d in range(documents):
        year, start = 1790 + d * 230 // documents, 0
        for s in range(int(rng.integers(3, 9))):
            chosen = [random.choice(SENTENCES) for _ in range(max(2, tokens // 22))]
            text = " ".join(chosen) if s else "\n\n".join(chosen)
            if len(sequences) % 23 < len(special) and s == 1:
                text = special[len(sequences) % 23] + " " + text
            if s == 2:  # a near-duplicate of the passage before
                text = sequences[-1]["text"] + " Thank you, and good night."
            sequences.append(
                {
                    "sequence": len(sequences),
                    "document": f"{year}_{SPEAKERS[d % 5].lower().replace(' ', '_')}",
                    "start": start,
                    "end": start + len(text),
                    "text": text,
                    "metadata": json.dumps({"year": year, "speaker": SPEAKERS[d % 5], "odd": "\ud800<i>"}),
                }
            )
            start += len(text) + 1
    return sequences


def seal(path: Path, **changes: Any) -> None:
    """Write the manifest anew, with ``changes`` and the checksums of the files as they are now."""
    key, manifest = {"stage": "trace", "schema": SCHEMA}, path / "manifest.json"
    write_json(path / "key.json", key)
    old = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    told = {name: x for name, x in old.items() if name not in ("key", "digest", "files")}
    Artifact(path, key).finish(told | changes)


def _top(
    rng: np.random.Generator, query: dict, raw: np.ndarray, corpus: list[dict], per_side: int, n_layers: int, n: int
) -> list[dict[str, Any]]:
    order = np.argsort(-raw, kind="stable")
    wanted = {w.lower() for w in re.findall(r"\w{4,}", query["prompt"] + query["completion"])}
    rows = []
    for side, chosen in (("positive", order[:per_side]), ("negative", order[::-1][:per_side])):
        for rank, index in enumerate(chosen.tolist(), 1):
            sequence, score = corpus[index], float(raw[index])
            pieces = cut(sequence["text"])
            likes = np.array([1.0 + 4 * (p.strip().lower() in wanted) for p in pieces])
            values = rng.standard_t(3, len(pieces)) * likes
            if rank == 7:
                values[3] += 400
            values = _summing(values * abs(score) / max(1.0, np.abs(values).sum()) * 2, score)
            layers = _summing(rng.standard_normal(n_layers) * abs(score) / 8 + score / n_layers, score)
            rows.append(
                {
                    **{key: sequence[key] for key in ("sequence", "document", "start", "end", "text", "metadata")},
                    "query": query["id"],
                    "side": side,
                    "rank": rank,
                    "score": np.float32(score),
                    "score_nats": np.float32(score / n),
                    "scan_score": np.float32(score * 1.01),
                    "rescored": True,
                    "spurious": bool(np.linalg.norm(values) / np.abs(values).sum() > 2 / 3),
                    "layers": layers,
                    "tokens": pieces,
                    "token_scores": values,
                    "tfidf_rank": None if rank == 9 else int(rng.integers(1, n)),
                    "tfidf_score": np.float32(rng.uniform(0, 40)),
                    "overlap": np.float32(rng.beta(2, 4)),
                }
            )
    return rows


def _summing(values: np.ndarray, total: float) -> np.ndarray:
    """``values`` moved a little so that they sum to ``total``."""
    return (values + (total - values.sum()) / len(values)).astype(np.float32)


def _query(rng: np.random.Generator, query: dict[str, Any]) -> dict[str, Any]:
    def spelled(text: str, likely: float) -> list[dict[str, Any]]:
        return [{"text": piece, "log_prob": -float(rng.exponential(likely))} for piece in cut(text)]

    completion = spelled(query["completion"], 0.3)
    contrast = spelled(query["contrast"], 3.0) if query.get("contrast") else None
    log_prob = sum(t["log_prob"] for t in completion) - sum(t["log_prob"] for t in contrast or [])
    return {
        "id": query["id"],
        "prompt": query["prompt"],
        "completion": query["completion"],
        "contrast": query.get("contrast"),
        "generated": False,
        "log_prob": log_prob,
        "measurement": log_prob,
        "completion_tokens": completion,
        "contrast_tokens": contrast,
        "rank_correlation": 0.9961,
    }


def _manifest(layers: list[dict], n: int, documents: int) -> dict[str, Any]:
    untracked = [
        {"name": "embed_tokens", "parameters": 786432, "share": 0.235, "why": "embedding"},
        {"name": "self_attn", "parameters": 884736, "share": 0.265, "why": "not among the layers asked for"},
    ]
    return {
        "upriver": "0.1.0",
        "stage": "trace",
        "n_train": n,
        "scored_sequences": n,
        "candidates": None,
        "model": {
            "name": "models/speeches-3m",
            "fingerprint": "9f1c02ab77e0",
            "parameters": 3342144,
            "dtype": "float32",
            "attention": "sdpa",
        },
        "tokenizer": {"fingerprint": "51bb20c9a7d1"},
        "corpus": {
            "path": "data/speeches.jsonl",
            "fingerprint": "c0ffee12ab34",
            "documents": documents,
            "sequences": n,
            "tokens": n * 110,
            "seq_len": 128,
            "pack": False,
        },
        "coverage": {"tracked": 1671072, "total": 3342144, "share": 0.5, "untracked": untracked},
        "layers": layers,
        "curvature": "ekfac",
        "damping": "0.1x",
        "fisher": {"labels": "sampled", "seed": 0},
        "fit": {
            "sequences": n,
            "tokens": n * 110,
            "halves": {"mean": 0.962, "worst": 0.913, "what": "two halves"},
        },
        "rank": 32,
        "rank_error": {"mean": 0.996, "worst": 0.981, "what": "compressed against full-rank scores"},
        "top": 20,
        "kernel": "sdpa",
        "checks": {"token_sum": 2.1e-7, "layer_sum": 1.2e-7},
        "versions": {"python": "3.11.7", "torch": "2.6.0", "transformers": "4.56.0"},
        "sign": "Positive means: training on the passage raises the log-probability of the answer.",
    }


def solved(path: Path, changes: dict[str, Any] | None = None) -> Path:
    """The folder with what a solver tells of every query; ``changes`` to that of the second."""
    energies = [(341.2, 0.3, 11.52), (18.41, 0.013, 8.5)]
    queries = json.loads((path / "queries.json").read_text(encoding="utf-8"))
    for query, (energy, scale, plain) in zip(queries, energies, strict=True):
        gradient = {"energy": -4.0, "best_scale": 0.002, "best_energy": plain}
        query["solution"] = {
            "converged": True, "why": None, "residual": 3e-4, "steps": 3, "energy": energy / 2, "best_scale": scale,
            "best_energy": energy, "gradient": gradient, "held_out": {"sequences": 240, "tokens": 30000},
        }  # fmt: skip
    queries[1]["solution"] |= changes or {}
    (path / "queries.json").write_text(json.dumps(queries), encoding="utf-8")
    solver = {
        "name": "ekfac",
        "refine": 3,
        "converged": True,
        "why": None,
        "passes": 4.2,
        "lambda_rule": "0.1 x mean lam",
    }
    seal(path, solver=solver)
    return path


class Parts(html.parser.HTMLParser):
    """The scripts of a page: their attributes and content, as a browser separates them."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.scripts:
            attrs, content = self.scripts[-1]
            self.scripts[-1] = (attrs, content + data)


def payload(page: str) -> dict[str, Any]:
    """What the page holds, with each question unpacked."""
    blocks = {attrs["id"]: (attrs, content) for attrs, content in Parts(page).scripts if "id" in attrs}

    def unpacked(name: str) -> dict[str, Any]:
        attrs, content = blocks[name]
        packed = attrs.get("data-encoding") == "gzip"
        return json.loads(gzip.decompress(base64.b64decode(content)) if packed else content)

    head = unpacked("data")
    return head | {"queries": [unpacked(f"question-{i}") for i in range(len(head["queries"]))]}


if __name__ == "__main__":
    import sys

    print(write_scores(Path(sys.argv[1]), *map(int, sys.argv[2:])))
