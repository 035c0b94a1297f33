"""A model whose weights in float32 alone would take more than the memory: fitted and traced in bfloat16 within it.

    python benchmarks/half.py [--memory 3.5GB] [--blocks 72] [--out build/half]

A Llama type of random weights in bfloat16, 1,024 wide with MLPs of 2,816 in 72 blocks (925 million parameters, 3.7 GB in
float32), of which the MLPs of three blocks are tracked.  Each command is a process of its own; prints its peak resident memory
and time.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from command import upriver
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from upriver.runtime.config import parse_memory

WORDS, TOKENS, SEQUENCES = 512, 64, 8


def write_job(folder: Path, blocks: int) -> int:
    """The model, a corpus and two questions; returns the parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks, num_attention_heads=8,
        max_position_embeddings=TOKENS, bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    module.save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    texts = [" ".join(f"w{i}" for i in row) for row in torch.randint(WORDS, (SEQUENCES, TOKENS)).tolist()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = [
        {"id": f"q{i}", "prompt": texts[i][:80].rsplit(" ", 1)[0], "completion": f" w{i} w{i + 1}"} for i in range(2)
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in asked))
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="3.5GB")
    parser.add_argument("--blocks", type=int, default=72)
    parser.add_argument("--out", type=Path, default=Path("build/half"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    parameters = write_job(args.out, args.blocks)
    model, corpus, limit = args.out / "model", args.out / "corpus.jsonl", parse_memory(args.memory) or 0
    how = ("--memory", args.memory, "--dtype", "bfloat16")
    factors = (
        "--out",
        args.out / "factors",
        "--seq-len",
        TOKENS,
        "--layers",
        "model.layers.1[0-2].mlp.*",
        "--batch-tokens",
        256,
    )
    fit = upriver("fit", model, corpus, *factors, *how)
    scores = ("--factors", args.out / "factors", "--out", args.out / "scores", "--top", 2)
    trace = upriver("trace", model, corpus, args.out / "queries.jsonl", *scores, *how)
    exact = json.loads((args.out / "scores" / "manifest.json").read_text())["model"]["exact_dtype"]
    print(f"\n{parameters:,} parameters: {4 * parameters / 1e9:.2f} GB in float32, {2 * parameters / 1e9:.2f} in bfloat16; "
          f"limit {limit / 1e9:.2f} GB; questions and the top in {exact}\n")  # fmt: skip
    print("| command | peak resident memory, GB | seconds |\n|---|---|---|")
    for name, ran in (("fit", fit), ("trace", trace)):
        print(f"| {name} | {ran.peak / 1e9:.2f} | {ran.seconds:.0f} |")


if __name__ == "__main__":
    main()
