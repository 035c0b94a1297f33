"""How good the plan is: `upriver plan`, then the fit and the trace that it planned, each a process of its own.

    python benchmarks/plan.py [--jobs demo,neox,smollm2] [--out build/plan]

Time and peak resident memory, predicted and measured, on three jobs: the demo, a random GPT-NeoX-type model (512 wide, 6
layers, vocabulary 8,192; 64 sequences of 256 tokens, 8 queries), and SmolLM2-135M with 100 passages of 128 tokens (see
benchmarks/smollm2.py for what it needs).  Each process has `--dtype float32` and as many threads as torch takes.
"""

import argparse
import json
import random
import shutil
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import smollm2
from command import upriver

WORDS = 8192


class Case(NamedTuple):
    name: str
    model: Path
    corpus: Path
    queries: Path
    seq_len: int
    max_tokens: int


def demo(folder: Path) -> Case:
    place = Path(str(resources.files("upriver") / "demo"))
    return Case("demo", place / "speech-model", place / "speeches.jsonl.xz", place / "queries.jsonl", 128, 65_536)


def neox(folder: Path) -> Case:
    """A random model with a tokenizer of 8,192 made-up words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=WORDS, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(f"w{draw.randrange(1, WORDS)}" for _ in range(n))

    corpus, queries = folder / "corpus.jsonl", folder / "queries.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(i), "text": text(256)}) + "\n" for i in range(64)))
    asked = [{"id": f"q{i}", "prompt": text(16), "completion": " " + text(16)} for i in range(8)]
    queries.write_text("".join(json.dumps(q) + "\n" for q in asked))
    return Case("neox", folder / "model", corpus, queries, 256, 65_536)


def smol(folder: Path) -> Case:
    model, corpus, queries = smollm2.model_file(), folder / "passages.jsonl", folder / "queries.jsonl"
    smollm2.write_passages(corpus, model, 100, 128)
    asked = [q | {"completion": q.get("completion", " to keep the peace")} for q in smollm2.QUERIES]
    queries.write_text("".join(json.dumps(q) + "\n" for q in asked))
    return Case("smollm2", model, corpus, queries, 160, 65_536)


JOBS = {"demo": demo, "neox": neox, "smollm2": smol}


def measure(case: Case, folder: Path) -> list[tuple[str, float, float, float, float]]:
    """For fit and trace: seconds predicted and measured, GB predicted and measured."""
    place, factors, scores = folder / "plan.json", folder / "factors", folder / "scores"
    common = (case.model, case.corpus)
    fit_flags = ("--seq-len", case.seq_len, "--max-tokens", case.max_tokens)
    upriver("plan", *common, "--queries", case.queries, *fit_flags, "--top", 10, "--out", place)
    plan = json.loads(place.read_text())
    measured = {
        "fit": upriver("fit", *common, "--out", factors, *fit_flags, "--overwrite"),
        "trace": upriver(
            "trace", *common, case.queries, "--factors", factors, "--out", scores, "--top", 10, "--overwrite"
        ),
    }
    return [
        (f"{case.name} {verb}", plan["seconds"][verb], seconds, plan["peak_bytes"][verb] / 1e9, peak / 1e9)
        for verb, (seconds, peak) in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--out", type=Path, default=Path("build/plan"))
    args = parser.parse_args()
    rows = []
    for name in args.jobs.split(","):
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rows += measure(JOBS[name](folder), folder)
    print("| run | planned, s | measured, s | ratio | planned peak, GB | measured peak, GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, planned, seconds, peak, memory in rows:
        print(
            f"| {name} | {planned:.1f} | {seconds:.1f} | {planned / seconds:.2f} "
            f"| {peak:.2f} | {memory:.2f} | {peak / memory:.2f} |"
        )


if __name__ == "__main__":
    main()
