"""A fit whose factors take several times the memory that it may use, and the same fit without a limit.

    python benchmarks/memory.py [--memory 2GB] [--blocks 168] [--out build/memory]

A GPT-NeoX type of random weights, 128 wide with MLPs of 2,048 in 168 blocks, whose factors take 6 GB on the disk.  Each fit is a
process of its own; prints its peak resident memory and time, and whether the factors of the two are the same bit for bit.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from command import Ran, upriver
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from upriver.runtime.artifact import file_digest

WORDS = 512


def write_job(folder: Path, blocks: int, sequences: int, tokens: int) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=WORDS, hidden_size=128, intermediate_size=2048, num_hidden_layers=blocks, num_attention_heads=2,
        max_position_embeddings=tokens, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    words_NT = torch.randint(WORDS, (sequences, tokens))
    lines = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in words_NT.tolist())
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fit(folder: Path, name: str, tokens: int, *flags: str) -> Ran:
    return upriver(
        "fit", folder / "model", folder / "corpus.jsonl", "--out", folder / name, "--seq-len", tokens, *flags
    )


def digests(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): file_digest(f) for f in sorted(folder.rglob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--blocks", type=int, default=168)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("build/memory"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    write_job(args.out, args.blocks, args.sequences, args.tokens)
    common = ("--batch-tokens", str(args.tokens))  # of one sequence: what the limit leaves, so that sums round alike
    rows = {
        f"--memory {args.memory}": fit(args.out, "limited", args.tokens, *common, "--memory", args.memory),
        "no limit": fit(args.out, "free", args.tokens, *common),
    }
    limited, free = digests(args.out / "limited"), digests(args.out / "free")
    size = sum(f.stat().st_size for f in (args.out / "free").rglob("*.safetensors"))
    print(f"factors: {size / 1e9:.2f} GB in {len(free)} files\n")
    print("| fit | peak resident memory, GB | seconds |\n|---|---|---|")
    for name, (seconds, peak) in rows.items():
        print(f"| {name} | {peak / 1e9:.2f} | {seconds:.0f} |")
    print(f"\nthe same bits: {limited == free}")


if __name__ == "__main__":
    main()
