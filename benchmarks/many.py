"""What many questions cost: 1,500 of them on a small corpus, traced and reported; CPU seconds by stage, memory, files.

    python benchmarks/many.py [--queries 1500] [--documents 200] [--top 100] [--model FOLDER] [--out FOLDER] [--profile]

A Llama type of random weights, 64 wide, 2 layers, with the demo's tokenizer (or another model, such as the demo's), on 200
passages of the demo's speeches, 128 tokens at most; each question is a beginning and its next words from another place of them.
CPU seconds are those of the process and its threads:
other programs on the machine change them little.
"""

import argparse
import cProfile
import json
import lzma
import pstats
import resource
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import upriver as up

DEMO = resources.files("upriver") / "demo"


def texts(path: Path, count: int) -> list[str]:
    with lzma.open(str(DEMO / "speeches.jsonl.xz"), "rt") as lines:
        words = [json.loads(line)["text"].split() for line in lines]
    pieces = [" ".join(w[i : i + 60]) for w in words for i in range(0, len(w) - 60, 60)]
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(pieces[:count])))
    return pieces[count:]


def asked(pieces: list[str], count: int) -> list[dict[str, str]]:
    found = []
    for text in pieces[:count]:
        words = text.split()
        found.append({"prompt": " ".join(words[:16]), "completion": " " + " ".join(words[16:20])})
    return found


def small() -> up.Model:
    torch.manual_seed(0)
    tokenizer = up.load_model(str(DEMO / "speech-model")).tokenizer
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return up.Model(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), tokenizer)


def stage(name: str, work: Callable[[], Any], profile: bool) -> Any:
    profiler = cProfile.Profile()
    cpu, wall = time.process_time(), time.perf_counter()
    result = profiler.runcall(work) if profile else work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name:8} {cpu:7.1f} s of CPU, {wall:7.1f} s, peak so far {peak:.2f} GB", flush=True)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1500)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, help="folder that is kept; default: a temporary one")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        pieces = texts(out / "corpus.jsonl", args.documents)
        model = up.load_model(str(args.model)) if args.model else small()
        corpus = up.Corpus.read(out / "corpus.jsonl", model.tokenizer, seq_len=128)
        queries = up.Queries.of(asked(pieces, args.queries), model.tokenizer)
        print(f"{len(queries):,} questions, {len(corpus):,} sequences of {corpus.n_tokens:,} tokens", flush=True)
        factors = stage("fit", lambda: up.fit(model, corpus, out=out / "factors"), False)
        how = {"top": args.top, "say": print if args.profile else lambda text: None}
        result = stage("trace", lambda: up.trace(model, corpus, queries, factors, out / "scores", **how), args.profile)
        print({name: round(seconds, 1) for name, seconds in result.manifest["timings"].items()})
        stage("report", result.report, args.profile)
        for path in sorted((out / "scores").iterdir()):
            if path.is_file() and path.stat().st_size > 1e6:
                print(f"{path.name:20} {path.stat().st_size / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
