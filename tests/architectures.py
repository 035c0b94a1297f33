"""Every causal type of transformers goes through fit and trace in small; run it to print the page docs/architectures.md.

python tests/architectures.py                    all, ten minutes; what is in build/architectures.jsonl is not run again
python tests/architectures.py mixtral gemma3     the rows of these, run anew
"""

import contextlib
import json
import re
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import upriver as up
from small import CAUSAL, SEEING, build
from text_cases import byte_tokenizer
from upriver.errors import UpriverError
from upriver.model.check import check_causal, tracked_layers
from upriver.model.coverage import coverage
from upriver.model.experts import experts_of
from upriver.model.layers import ATTENTION, KINDS, LINEAR, MIXER, MIXER_CLASS, MLP_CLASS, ROUTER, find_layers
from upriver.model.parts import Part
from upriver.model.text_part import inside, other_parts

KEPT = Path(__file__).parent.parent / "build" / "architectures.jsonl"
SECONDS = 120  # that a type may take
EQUAL = 1e-5  # of the largest score
RECORDS = [
    "we the people of the united states of america",
    "it is the end of the war",
    "the union is strong, my friends",
]
NO_MLP = re.compile(r"norm|embed|position|altup|laurel|per_layer|(^|_)hc(_|$)|hyper_connection", re.IGNORECASE)


def texts(folder: Path) -> tuple[Any, up.Corpus, up.Queries]:
    """A tokenizer, and a small corpus and a question in it."""
    tokenizer = byte_tokenizer()
    (folder / "texts").mkdir()
    for i, text in enumerate(RECORDS):
        (folder / "texts" / f"{i}.txt").write_text(text)
    corpus = up.Corpus.read(folder / "texts", tokenizer, seq_len=16, cache=folder / "cache")
    question = {"id": "q", "prompt": "the people", "completion": " of the union"}
    return tokenizer, corpus, up.Queries.of([question], tokenizer)


def gradient(layers, loss):
    """Plain autograd on the tracked weights, as one vector."""
    modules = [m for x in layers for m in x.modules]
    held = [m.stored.values() if isinstance(m, Part) else m.parameters(recurse=False) for m in modules]
    weights = list(dict.fromkeys(p for parameters in held for p in parameters))  # all experts of a block are one
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in zip(grads, weights, strict=True)]
    )


def expected_dot_products(model, corpus, queries, layers):
    """Minus the dot product of plain gradients: the influence under the identity curvature."""
    f = model.task.measurement(model.module, queries.batch([0])).sum()
    q = gradient(layers, f)
    rows = [corpus.batch(np.array([n])) for n in range(len(corpus))]
    return [-float(q @ gradient(layers, model.task.loss(model.module, batch))) for batch in rows]


def mlp_parameters(module: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The matrices in the blocks of the text part that are neither attention nor a mixer of tokens, a router, a norm or an
    embedding, by the names and classes around them."""
    found, others = set(), other_parts(module)
    for name, p in module.named_parameters():
        owner, around = name.rpartition(".")[0], name.split(".")[:-1]
        above = [module.get_submodule(".".join(around[: i + 1])) for i in range(len(around))]
        classes = ["" if isinstance(m, LINEAR) else type(m).__name__ for m in above]
        numbered = next((i for i, part in enumerate(around) if part.isdigit()), None)
        if numbered is None or p.ndim < 2 or inside(name, others):
            continue
        labels, classes = around[numbered + 1 :] or around[numbered:], classes[numbered + 1 :]
        if any(map(NO_MLP.search, name.split(".")[numbered + 1 :])):
            continue
        mixes = any(map(ATTENTION.search, labels + classes)) or (
            any(map(MIXER.search, labels)) and not any(map(MLP_CLASS.search, classes))
        )
        if not (mixes or any(map(MIXER_CLASS.search, classes)) or ROUTER.search(owner.rpartition(".")[2])):
            found.add(p)
    return found


def shares(module: torch.nn.Module, model: up.Model, corpus: up.Corpus) -> dict[str, Any]:
    """The share of the parameters that each kind of layers is, of those of the MLP the tracked ones, and what is left out."""
    total, told = sum(p.numel() for p in module.parameters()), {}
    for kind in KINDS:
        try:
            layers = tracked_layers(model, corpus, kind)
        except UpriverError:
            told[kind] = None
            continue
        found = coverage(module, layers)
        told[kind] = found.share
        if kind == "mlp":
            held = [m.stored.values() if isinstance(m, Part) else m.parameters() for x in layers for m in x.modules]
            wanted, have = mlp_parameters(module), {p for some in held for p in some}
            told["of_mlp"] = sum(p.numel() for p in wanted & have) / max(1, sum(p.numel() for p in wanted))
        if kind == "all":
            plain = ("embedding", "norm or vector", "language-model head")
            told["left"] = [(u["name"], u["share"], u["why"]) for u in found.untracked if u["why"] not in plain]
    experts = {p for m in module.modules() for x in experts_of(m).values() for p in x.stored.values()}
    return told | {"experts": sum(p.numel() for p in experts) / total}


def examined(name: str, folder: Path, given: tuple[Any, up.Corpus, up.Queries], module: Any = None) -> dict[str, Any]:
    """What fit and trace make of a type: shares, and by how much scores differ from plain autograd; or why it is refused."""
    tokenizer, corpus, queries = given
    try:
        module = module or build(name)
        with torch.no_grad():
            module(input_ids=torch.arange(2, 14)[None], use_cache=False).logits  # noqa: B018
    except Exception as error:
        return {"type": name, "not built": f"{type(error).__name__}: {error}"}
    told = {"type": name, "class": type(module).__name__}
    try:
        check_causal(module)
        model = up.Model(module, tokenizer, name=name)
        told |= shares(module, model, corpus)
        told["mode"] = mode = "mlp" if told["mlp"] else "all"
        factors = up.fit(model, corpus, folder / "factors", layers="all")
        fitted = up.trace(model, corpus, queries, factors, folder / "fitted", top=2)
        plain = up.trace(model, corpus, queries, factors, folder / "plain", top=2, curvature="identity", rank="full")
        names = {x.name for x in factors.layers}
        layers = [x for x in find_layers(module, "all") if x.name in names]
        expected = expected_dot_products(model, corpus, queries, layers)
        off = np.abs(plain.frame()["q"].to_numpy() - expected).max() / np.abs(expected).max()
        assert np.isfinite(fitted.frame()["q"]).all(), mode
        told["off"] = float(off)
    except Exception as error:
        told["refused"] = f"{'' if isinstance(error, UpriverError) else type(error).__name__ + ': '}{error}"
    return told


def row(told: dict[str, Any]) -> str:
    """A row of the table, without what a machine decides."""
    if "not built" in told:
        return f"| {told['type']} | not built | | | | | | | {short(told['not built'])} |"
    found = [told.get(kind) for kind in KINDS]
    cells = ["none" if x is None else f"{x:.0%}" for x in found] if "experts" in told else ["", "", ""]
    experts = f"{told['experts']:.0%}" if told.get("experts") else ""
    of_mlp = f"{told['of_mlp']:.0%}" if "of_mlp" in told else ""
    note = "; ".join(f"{name} {share:.0%}: {why}" for name, share, why in told.get("left", []) if share >= 0.005)
    same = "refused" if "refused" in told else "yes" if told["off"] < EQUAL else f"{told['off']:.0e}"
    note = short(told["refused"]) if "refused" in told else note
    return f"| {told['type']} | {told['class']} | {' | '.join(cells)} | {experts} | {of_mlp} | {same} | {note} |"


def short(text: str) -> str:
    """One line that a cell of the table holds."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) < 240 else f"{text[:240]} ..."


@contextlib.contextmanager
def limited(seconds: int):
    def stop(*_):
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sweep(names: list[str], again: bool) -> list[dict[str, Any]]:
    """Each type, one after the other; what is known is kept in a file, so that an interrupted run goes on."""
    KEPT.parent.mkdir(exist_ok=True)
    known = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    found = {} if again else {told["type"]: told for told in known}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = texts(Path(folder))
        for name in names:
            if name in found:
                continue
            place = Path(folder) / name
            place.mkdir()
            try:
                with limited(SECONDS):
                    found[name] = examined(name, place, given)
            except TimeoutError as error:
                found[name] = {"type": name, "not built": str(error)}
            with KEPT.open("a") as file:
                file.write(json.dumps(found[name]) + "\n")
            print(row(found[name]), file=sys.stderr, flush=True)
    return [found[name] for name in names]


HEADER = """# Architectures

Every type that transformers maps to a causal language model is built here from a small configuration, with random weights, and
goes through `fit` and `trace` (`--layers all`); the scores under the identity curvature are compared with plain autograd on the
same weights. The second table holds the types that see too and answer to text alone: of them `mlp`, `attention` and `all` mean
the text part. The tables are printed by `python tests/architectures.py`; `tests/test_architectures.py` holds some of the rows,
of each kind, to what it finds.

- `mlp`, `attention`, `all`: the share of the parameters that is tracked. It is that of these small models (width 32, vocabulary
  320), where embeddings weigh much; your model's share is printed by every fit.
- experts: the share that transformers runs through its interface of experts, each of which is tracked by itself.
- of the MLP: what `mlp` tracks of the matrices of the blocks that are no attention, no mixer of tokens, no router and no norm.
- autograd: whether every score is that of autograd to 1e-5 of the largest.
- left out: what `all` does not track besides embeddings, norms and the head, from half a percent on, or why the type is refused.
  Each is named by every fit, with its share. Routers that are bare parameters are tracked.
"""
COLUMNS = ("type", "class", "`mlp`", "`attention`", "`all`", "experts", "of the MLP", "autograd", "left out")
HEADING = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def page(found: list[dict[str, Any]]) -> str:
    causal = [told for told in found if told["type"] in CAUSAL]
    seeing = [told for told in found if told["type"] in SEEING and "not built" not in told]
    built = [told for told in causal if "not built" not in told]
    through = [told for told in built if "refused" not in told]
    mixtures = [told for told in through if told["experts"]]
    whole = [told for told in mixtures if told.get("of_mlp", 0) >= 0.95]
    told = (
        f"Of {len(causal)} causal types {len(built)} can be built from a small configuration here, and {len(through)} of these "
        f"({len(through) / max(1, len(built)):.1%}) go through fit and trace, "
        f"{sum(x['off'] < EQUAL for x in through)} of them equal to autograd. {len(mixtures)} of them are mixtures that run "
        f"through the interface of experts; `mlp` tracks at least 95 % of the MLP of {len(whole)} of these."
    )
    return "\n".join([HEADER, told, "", HEADING, *map(row, causal), "", HEADING, *map(row, seeing), ""])


def main(names: list[str]) -> None:
    found = sweep(names or [*CAUSAL, *SEEING], again=bool(names))
    print(page(found), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
