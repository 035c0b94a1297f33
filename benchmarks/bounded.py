"""What a command keeps in memory of inputs that are large in one way or another: nothing of them may be held whole.

    python benchmarks/bounded.py [--memory 1GB] [--documents 1000000] [--out build/bounded]

Three inputs: 3 GB of zeros in one line, some 440 kB as .xz; one text of 15.9 MB; and a million documents of five words.  Each
goes through `upriver fit`, the last two through `upriver trace` as well, with `--memory`, in processes of their own.  Prints
the peak of each, beside that of the same commands on one short text.  Inputs and results that are in --out already stay.
"""

import argparse
import json
import lzma
import sys
from importlib import resources
from multiprocessing import Process
from pathlib import Path

from command import run

WIDTH, TOKENS = 32, 64


def write_model(folder: Path) -> None:
    """A narrow model of random weights with the tokenizer of the demo."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=None, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    with resources.as_file(resources.files("upriver") / "demo" / "speech-model") as demo:
        AutoTokenizer.from_pretrained(demo).save_pretrained(folder)


def speeches() -> str:
    with (
        resources.as_file(resources.files("upriver") / "demo" / "speeches.jsonl.xz") as file,
        lzma.open(file, "rt") as lines,
    ):
        return "\n".join(json.loads(line)["text"] for line in lines)


def inputs_in(folder: Path, gigabytes: float, documents: int) -> dict[str, Path]:
    return {
        "one short text": folder / "short.txt",
        f"{gigabytes:g} GB of zeros in a line": folder / "zeros.jsonl.xz",
        "a text of 15.9 MB": folder / "long.txt",
        f"{documents:,} documents": folder / "many.jsonl",
    }


def write_inputs(folder: Path, gigabytes: float, documents: int) -> None:
    write_model(folder / "model")
    short, bomb, long, many = inputs_in(folder, gigabytes, documents).values()
    text = speeches()
    short.write_text(text[:100_000])
    with lzma.open(bomb, "wb", preset=9) as sink:
        for _ in range(int(1000 * gigabytes)):
            sink.write(bytes(10**6))
    long.write_bytes((text * (1 + 16_000_000 // len(text))).encode()[:15_900_000].decode(errors="ignore").encode())
    words = text.split()
    with open(many, "w") as sink:
        for n in range(documents):
            sink.write(json.dumps({"text": " ".join(words[(7 * n + k) % len(words)] for k in range(5))}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"id": "q", "prompt": "The state of the", "completion": " Union"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("build/bounded"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (
        args.out / "queries.jsonl"
    ).exists():  # in a process of its own: what this one takes counts for those it starts
        writing = Process(target=write_inputs, args=(args.out, args.gigabytes, args.documents))
        writing.start()
        writing.join()
    env = {"UPRIVER_CACHE": str(args.out / "cache")}
    print("| input | size in MB | command | status | peak, MB | seconds |\n|---|---|---|---|---|---|")
    for name, corpus in inputs_in(args.out, args.gigabytes, args.documents).items():
        place = args.out / corpus.name.split(".")[0]
        how = ("--seq-len", TOKENS, "--memory", args.memory)
        steps = {
            "fit": ("fit", args.out / "model", corpus, "--out", place / "factors", "--max-tokens", 20_000, *how),
            "trace": (
                "trace", args.out / "model", corpus, args.out / "queries.jsonl", "--factors", place / "factors",
                "--out", place / "scores", "--top", 5, "--held-out", 0, "--memory", args.memory,
            ),
        }  # fmt: skip
        for command, step in steps.items():
            if command == "trace" and not (place / "factors").exists():
                continue  # it was refused
            ended, ran, said = run(*step, env=env)
            size = corpus.stat().st_size / 1e6
            print(
                f"| {name} | {size:.3g} | {command} | {ended} | {ran.peak / 1e6:,.0f} | {ran.seconds:,.0f} |",
                flush=True,
            )
            if ended:
                print(said.strip().splitlines()[-1], file=sys.stderr)


if __name__ == "__main__":
    main()
