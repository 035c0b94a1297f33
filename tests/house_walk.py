"""What a fit and a trace of the demo's model go through, as JSON: {"fit": [[file, function], ..], "trace": [..]}.

python tests/house_walk.py FOLDER     # a process of its own: nothing else that was traced or hooked in it decides what is seen
"""

import json
import lzma
import sys
import threading
from pathlib import Path

import upriver as up

SOURCE = Path(__file__).parent.parent / "src" / "upriver"
DEMO = SOURCE / "demo"


def run_through(work) -> list[tuple[str, str]]:
    """The files and the named functions of ours that ``work`` goes through."""
    seen: set[tuple[str, str]] = set()

    def note(frame, event, argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)) and "<" not in code.co_name:
            seen.add((code.co_filename, code.co_qualname))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sorted(seen)


def walk(folder: Path) -> dict[str, list[tuple[str, str]]]:
    with lzma.open(DEMO / "speeches.jsonl.xz", "rt") as speeches:
        (folder / "corpus.jsonl").write_text("".join(line for _, line in zip(range(2), speeches, strict=False)))
    model = up.load_model(DEMO / "speech-model")
    corpus = up.Corpus.read(folder / "corpus.jsonl", model.tokenizer, seq_len=128)
    queries = up.Queries.read(DEMO / "queries.jsonl", model.tokenizer)
    fitted = run_through(lambda: up.fit(model, corpus, folder / "factors", max_tokens=4000))
    factors = up.Factors(folder / "factors")
    traced = run_through(lambda: up.trace(model, corpus, queries, factors, folder / "scores", top=3, held_out=0))
    return {"fit": fitted, "trace": traced}


if __name__ == "__main__":
    print(json.dumps(walk(Path(sys.argv[1]))))
