"""What one GPU does: a command of at most eight minutes on a large one, with nothing downloaded.

    python benchmarks/gpu.py --out build/gpu                              all parts, on the first GPU
    python benchmarks/gpu.py --out build/gpu --parts equal,speed          or --skip peers
    python benchmarks/gpu.py --out build/gpu --small --device cpu         the reduced form that the tests run

equal    scores of a small model on the device against those of the CPU, in float32 and in bfloat16
speed    passes of fit, scan and rescoring in tokens a second, as a share of a plain training step over the same batches (forward
         and backward with the gradients of all weights) and of the device's bfloat16 peak
memory   a whole fit and trace: the peak of each pass against the plan's figure
peers    Kronfluence (and Bergson), where they can be imported, on the same job as ours
large    a model of 8B scanned with 100 questions under a limit of 80 GB

Models have random weights in the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, made on the device; tokens are drawn.  A
part that fails leaves its error in the table, and one that would begin after `--minutes` is left out.  The table goes to
OUT/gpu.md, the numbers to OUT/gpu.json.  On a CPU, peaks are those of the process.
"""

import argparse
import copy
import gc
import importlib
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import upriver as up
from upriver.curvature.consumers import FIT_PROBES
from upriver.influence.forecast import plan_model, scan_probe
from upriver.influence.queries import Measurements
from upriver.influence.rescore import TokenScores
from upriver.influence.score import Score, route
from upriver.model.check import tracked_layers
from upriver.model.layers import Layer
from upriver.model.load import Model, pick_device
from upriver.model.planned import memory_budget
from upriver.model.shape import model_shape
from upriver.model.sweep import Source, sweep
from upriver.runtime.cost import Asked
from upriver.runtime.divide import divide_trace, scan_held
from upriver.runtime.plan import request_for
from upriver.runtime.progress import show_bytes
from upriver.tensors import LowRank
from upriver.text.examples import Examples

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from job import Job, load_module
from meter import Meter

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES = {
    "tiny": (32, 96, 2, 4, 2, 256),
    "small": (256, 768, 4, 8, 4, 4096),
    "135M": (576, 1536, 30, 9, 3, 49_152),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "8B": (4096, 14_336, 32, 32, 8, 128_256),
}
UNTIED = ("8B",)
KNOWN = {"H200": "h200", "H100": "h100", "A100": "a100-80gb", "L40S": "l40s", "RTX 4090": "rtx4090"}
SCAN, FIT, SAME, ALIKE, ROOM = 0.9, 3.2, 1e-4, 0.999, 80_000_000_000  # the goals
OTHER = 7  # sequences of a batch on the device: the CPU takes others, so that sums go in another order
SIDES = ("kronfluence", "bergson")
RANK, QUERY_TOKENS, SLOTS = 32, 32, 4  # of a question; questions that are rescored at once


class Sizes(NamedTuple):
    """How large the jobs are: models by name, sequences and batches in tokens."""

    equal: str
    speed: tuple[str, ...]
    whole: str  # of the parts memory and peers
    large: str
    length: int
    batch: int
    tokens: int  # of a timed pass, and of the large scan
    corpus: int  # of a whole fit and trace
    columns: tuple[int, ...]  # questions of a scan, the first of which has the goal
    questions: int  # of a whole trace, and of the peers
    many: int  # of the large scan
    repeats: int


FULL = Sizes("small", ("135M", "1B"), "135M", "8B", 512, 16_384, 65_536, 131_072, (8, 100), 16, 100, 3)
SMALL = Sizes("tiny", ("tiny",), "tiny", "tiny", 32, 256, 512, 1024, (2, 6), 3, 5, 1)


@dataclass
class Row:
    """One line of the table; ``met`` is None where there is no goal or nothing was measured."""

    part: str
    what: str
    found: str
    goal: str = ""
    met: bool | None = None
    value: float | None = None  # what is held against the goal


class Tokens(Examples):
    """Drawn sequences of one length; tokens after the first ``prompt`` carry loss."""

    def __init__(self, tokens_NT: np.ndarray, prompt: int = 1):
        rows, length = tokens_NT.shape
        loss_NT = (torch.arange(length) >= prompt).repeat(rows, 1)
        super().__init__({"tokens": torch.from_numpy(tokens_NT), "loss": loss_NT})
        self.lengths_N = np.full(rows, length, np.int32)


class Gauge(Meter):
    """Seconds and peak memory by phase: of the device where it has its own, else of the process."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.own = device, device.type == "cuda"

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """As :func:`upriver.fit` and :func:`upriver.trace` tell of their passes."""
        with self(name.split(",")[0]):
            yield lambda done: None

    def _start(self) -> None:
        if not self.own:
            super()._start()
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if not self.own:
            super()._stop()
        elif self._open:
            torch.cuda.synchronize(self.device)
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - self._since
            self.peak[phase] = max(self.peak.get(phase, 0), torch.cuda.max_memory_allocated(self.device))


class Bench(NamedTuple):
    sizes: Sizes
    device: torch.device
    folder: Path  # of what is written on the way
    dtype: torch.dtype = torch.bfloat16

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def draw(self, name: str, tokens: int, length: int, prompt: int = 1, seed: int = 1) -> Tokens:
        return Tokens(drawn(name, max(2, tokens // length), length, seed), prompt)

    def seconds(self, work: Callable[[], Any]) -> float:
        """The median of a few runs after one that warms up."""
        took = []
        for _ in range(self.sizes.repeats + 1):
            with (gauge := Gauge(self.device))("run"):
                work()
            took.append(gauge.seconds["run"])
        return statistics.median(took[1:])


def drawn(name: str, rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(SHAPES[name][-1], size=(rows, length))


def build(name: str, device: torch.device, dtype: torch.dtype, length: int) -> Model:
    """A Llama of random weights, made where it stays and in the type that it stays in."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(zip(FIELDS, SHAPES[name], strict=True)),
        tie_word_embeddings=name not in UNTIED,
        max_position_embeddings=max(2048, length),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with device:
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Model(module.eval(), name=name)


# ------------------------------------------------------------------------------------------------- equal


def scores_of(model: Model, corpus: Tokens, asked: Measurements, folder: Path, dtype: str, batch: int) -> np.ndarray:
    """A fit and a trace at full rank, ``[N, Q]``; with the corpus's labels, as a drawn one may flip where numbers are rounded."""
    common: dict[str, Any] = {"dtype": dtype, "batch_tokens": batch}
    factors = up.fit(model, corpus, folder / "factors", fisher="empirical", max_tokens=None, **common)
    found = up.trace(model, corpus, asked, factors, folder / "scores", rank="full", top=1, held_out=0, **common)
    return found.frame()[asked.ids].to_numpy()


def apart(found_NQ: np.ndarray, true_NQ: np.ndarray) -> float:
    """The largest difference, of the largest score of the same question."""
    return float((np.abs(found_NQ - true_NQ).max(0) / np.abs(true_NQ).max(0)).max())


def alike(found_NQ: np.ndarray, true_NQ: np.ndarray) -> float:
    """The correlation of the worst question."""
    pairs = zip(found_NQ.T.astype(np.float64), true_NQ.T.astype(np.float64), strict=True)
    return float(min(np.corrcoef(a, b)[0, 1] for a, b in pairs))


def equal(bench: Bench) -> Iterator[Row]:
    s, name = bench.sizes, bench.sizes.equal
    reference = build(name, torch.device("cpu"), torch.float32, s.length)
    there = Model(copy.deepcopy(reference.module).to(bench.device))
    corpus = bench.draw(name, s.length * 64, s.length)
    asked = Measurements(bench.draw(name, 4 * QUERY_TOKENS, QUERY_TOKENS, QUERY_TOKENS // 2, seed=2))
    true_NQ = scores_of(reference, corpus, asked, bench.folder / "cpu", "float32", s.batch)
    found_NQ = scores_of(there, corpus, asked, bench.folder / "float32", "float32", OTHER * s.length)
    off = apart(found_NQ, true_NQ)
    yield Row("equal", "float32, largest difference", f"{off:.1e}", f"at most {SAME:.0e}", off <= SAME, off)
    found_NQ = scores_of(there, corpus, asked, bench.folder / "bfloat16", "bfloat16", OTHER * s.length)
    worst = alike(found_NQ, true_NQ)
    yield Row(
        "equal", "bfloat16, correlation, worst question", f"{worst:.6f}", f"at least {ALIKE}", worst >= ALIKE, worst
    )


# ------------------------------------------------------------------------------------------------- speed


def peak_of(bench: Bench) -> tuple[float, str]:
    """The bfloat16 peak in FLOP/s as the vendor prints it, else as a large product reaches it."""
    told = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    printed = tomllib.loads((files("upriver") / "runtime" / "hardware.toml").read_text())
    for part, entry in KNOWN.items():
        if part in told:
            return printed[entry]["bfloat16"], f"the data sheet of {part}"
    n = 8192 if bench.device.type == "cuda" else 256
    x = torch.ones(n, n, dtype=bench.dtype, device=bench.device)
    return 2.0 * n**3 / bench.seconds(lambda: x @ x), f"a product of side {n:,}"


def step(model: Model, source: Source, batches: list[np.ndarray]) -> None:
    """A plain forward and full backward pass, every parameter with a gradient."""
    model.module.train()
    for rows in batches:
        source.loss(model, source.batch(rows).to(model.device)).backward()
        model.module.zero_grad(set_to_none=True)
    model.module.eval()


def _rescoring(model: Model, layers: list[Layer], source: Source, rows: np.ndarray) -> tuple[TokenScores, float]:
    """Some questions at full rank on every sequence; zeros take as long as any."""
    zeros = {x.name: model.like.new_zeros(SLOTS, x.O, x.I) for x in layers}
    work = 2.0 * sum(x.O * x.I * (source.tokens(rows) * (1 + SLOTS) + len(rows) * SLOTS) for x in layers)
    return TokenScores(layers, zeros, {int(row): list(range(SLOTS)) for row in rows}), work


def speed(bench: Bench) -> Iterator[Row]:
    peak, by = peak_of(bench)
    yield Row("speed", "bfloat16 peak", f"{peak / 1e12:.3g} TFLOP/s, by {by}")
    for name in bench.sizes.speed:
        yield from _speeds(bench, name, peak)
        _release()


def _speeds(bench: Bench, name: str, peak: float) -> Iterator[Row]:
    s = bench.sizes
    model, corpus = build(name, bench.device, bench.dtype, s.length), bench.draw(name, s.tokens, s.length)
    layers, source = tracked_layers(model, corpus, "mlp"), Source.of(corpus, np.arange(len(corpus)), s.batch)
    shape, tokens, T = model_shape(model, layers, corpus), source.tokens(source.rows), float(s.length)
    batches = source.batches(source.rows)
    plain = bench.seconds(lambda: step(model, source, batches))

    def line(what: str, seconds: float, flop: float, goal: str = "", met: bool | None = None) -> Row:
        share = f"{plain / seconds:.2f} of a step's, {flop / seconds / peak:.0%} of the peak"
        return Row("speed", f"{name} {what}", f"{tokens / seconds:,.0f} tokens/s, {share}", goal, met, plain / seconds)

    yield line("plain step", plain, tokens * 2 * shape.step(T))
    probes = FIT_PROBES | {f"scan, {Q} questions": scan_probe(Asked(Q, QUERY_TOKENS, RANK)) for Q in s.columns}
    probes |= {f"rescore, {SLOTS} questions": _rescoring}
    through, fitted = tokens * 2 * (shape.forward(T) + shape.backward(T)), 0.0
    for what, probe in probes.items():
        work = probe(model, layers, source, source.rows)[1]

        def run(probe: Any = probe) -> None:
            sweep(model, layers, source, source.rows, probe(model, layers, source, source.rows)[0])

        seconds = bench.seconds(run)
        fitted += seconds * (what in FIT_PROBES)
        first = what == f"scan, {s.columns[0]} questions"
        goal = (f"at least {SCAN} of a step's", plain / seconds >= SCAN) if first else ("", None)
        yield line(what, seconds, through + work, *goal)
    steps = fitted / plain
    yield Row("speed", f"{name} fit, both passes", f"{steps:.2f} steps", f"at most {FIT} steps", steps <= FIT, steps)


# ------------------------------------------------------------------------------------------------- memory


def memory(bench: Bench) -> Iterator[Row]:
    s, name = bench.sizes, bench.sizes.whole
    model, corpus = build(name, bench.device, bench.dtype, s.length), bench.draw(name, s.corpus, s.length)
    asked = Measurements(bench.draw(name, s.questions * QUERY_TOKENS, QUERY_TOKENS, QUERY_TOKENS // 2, seed=2))
    common: dict[str, Any] = {"dtype": bench.kind, "batch_tokens": s.batch}
    wanted = request_for(
        corpus.lengths_N, fit_tokens=s.corpus, queries=len(asked), query_tokens=QUERY_TOKENS, rank=RANK, top=5, held_out=0,
        **common,
    )  # fmt: skip
    planned = {p.name: p.peak for p in plan_model(model, corpus, "mlp", wanted, None).passes}
    gauge = Gauge(bench.device)
    factors = up.fit(model, corpus, bench.folder / "factors", max_tokens=None, progress=gauge.progress, **common)
    how = {"rank": RANK, "top": 5, "held_out": 0, "progress": gauge.progress}
    up.trace(model, corpus, asked, factors, bench.folder / "scores", **how, **common)
    for phase, peak in gauge.peak.items():
        plan = planned.get(phase)
        found = f"{show_bytes(peak)} in {gauge.seconds[phase]:.2f} s" + (
            f", planned {show_bytes(plan)}" if plan else ""
        )
        ratio = peak / plan if plan else None
        yield Row(
            "memory", f"{name} {phase}", found, "at most as planned", None if ratio is None else ratio <= 1, ratio
        )


# ------------------------------------------------------------------------------------------------- peers


def peers(bench: Bench) -> Iterator[Row]:
    s, name = bench.sizes, bench.sizes.whole
    here = [side for side in SIDES if find_spec(side)]
    yield from (Row("peers", side, "not installed") for side in SIDES if side not in here)
    if not here:
        return
    shape, threads = SHAPES[name], torch.get_num_threads()
    job = Job(
        str(bench.folder), "llama", s.corpus // s.length, s.length, s.questions, QUERY_TOKENS, shape[0],
        shape[2], shape[-1], max(1, s.batch // s.length), s.questions, bench.kind, "empirical",
        threads, None, False, bench.device.type,
    )  # fmt: skip
    model = build(name, torch.device("cpu"), torch.float32, s.batch)
    model.module.save_pretrained(job.model)
    np.save(bench.folder / "corpus.npy", drawn(name, job.sequences, job.tokens, 1))
    np.save(bench.folder / "queries.npy", drawn(name, job.queries, job.query_tokens, 2))
    ours, mine_NQ = _ours(bench, job)
    yield Row("peers", f"{name} upriver", _took(ours))
    for side in here:
        try:
            _release()
            gauge, folder = Gauge(bench.device), bench.folder / side
            folder.mkdir()
            run = importlib.import_module(f"side_{side}").Side(job, folder)
            run.fit(gauge)
            theirs_NQ = run.score(gauge, job.queries, RANK)[0]
            faster = sum(gauge.seconds.values()) / sum(ours.seconds.values())
            told = (
                f"{_took(gauge)}; upriver {faster:.2f} times as fast, scores correlate {alike(mine_NQ, theirs_NQ):.4f}"
            )
            yield Row("peers", f"{name} {side}", told, value=faster)
        except Exception as error:
            yield failed("peers", side, error)


def _ours(bench: Bench, job: Job) -> tuple[Gauge, np.ndarray]:
    """The same job by ours: phases that a peer has no like of are left out."""
    model = Model(load_module(job, bench.dtype).to(bench.device))
    corpus, asked = Tokens(job.corpus_NT), Measurements(Tokens(job.queries_QT, job.prompt))
    gauge, common = Gauge(bench.device), {"dtype": bench.kind, "batch_tokens": bench.sizes.batch}
    how: dict[str, Any] = common | {"progress": gauge.progress}
    factors = up.fit(model, corpus, bench.folder / "factors", fisher=job.fisher, max_tokens=None, **how)
    found = up.trace(model, corpus, asked, factors, bench.folder / "scores", rank=RANK, top=1, held_out=0, **how)
    kept = ("covariance", "eigendecomposition", "correction", "queries", "scan")
    gauge.seconds = {phase: gauge.seconds[phase] for phase in kept}
    return gauge, found.frame()[asked.ids].to_numpy()


def _took(gauge: Gauge) -> str:
    parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in gauge.seconds.items())
    return f"{sum(gauge.seconds.values()):.2f} s ({parts}), peak {show_bytes(max(gauge.peak.values()))}"


# ------------------------------------------------------------------------------------------------- large


def large(bench: Bench) -> Iterator[Row]:
    s, name = bench.sizes, bench.sizes.large
    gauge = Gauge(bench.device)
    with gauge("build"):
        model = build(name, bench.device, bench.dtype, s.length)
    yield Row("large", f"{name} weights", f"{show_bytes(gauge.peak['build'])} in {gauge.seconds['build']:.1f} s")
    corpus = bench.draw(name, s.tokens, s.length)
    layers, asked = tracked_layers(model, corpus, "mlp"), Asked(s.many, QUERY_TOKENS, RANK)
    budget = memory_budget(model, corpus, s.batch, f"{ROOM}B", bench.kind)
    division = divide_trace(model_shape(model, layers, corpus), asked, budget)
    source = Source.of(corpus, np.arange(len(corpus)), division.batch_tokens)
    for group in division.groups["scan"]:  # one after the other, as over a corpus
        some = [layers[i] for i in group]
        chosen = scan_held(some, asked, budget, division.batch_tokens, division.scan_room)
        reads = {x.name: _questions(model, x, s.many) for x in some}
        routes = {name: route(chosen.orders[name], read, s.many, model.like) for name, read in reads.items()}
        del reads
        with gauge("scan"):
            consumer = Score(routes, s.many, False, chosen.hold)
            sweep(model, some, source, source.rows, consumer)
            consumer.result()
        del routes, consumer
        _release()
    peak, passes, tokens = gauge.peak["scan"], len(division.groups["scan"]), source.tokens(source.rows)
    each = tokens * passes / gauge.seconds["scan"]
    found = (
        f"{show_bytes(peak)}, planned {show_bytes(division.peak['scan'])}; {passes} passes, each {each:,.0f} tokens/s"
    )
    goal = f"at most {show_bytes(ROOM)}"
    yield Row("large", f"{name} scan, {s.many} questions", found, goal, peak <= ROOM, float(peak))


def _questions(model: Model, x: Layer, Q: int) -> Callable[[], LowRank]:
    """Solved questions of a layer, as they are read."""
    R, like = min(RANK, x.O, x.I), model.like
    low = LowRank(like.new_zeros(Q, x.O, R).normal_(), like.new_zeros(Q, R, x.I).normal_())
    return lambda: low


# ------------------------------------------------------------------------------------------------- all of it

PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "equal": equal, "speed": speed, "memory": memory, "peers": peers, "large": large,
}  # fmt: skip


def failed(part: str, what: str, error: Exception) -> Row:
    return Row(part, what, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/"))


def _release() -> None:
    """Give back what no tensor holds, so that a part does not pay for the one before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(names: list[str], sizes: Sizes, device: torch.device, minutes: float = 8.0) -> list[Row]:
    """The rows of the parts; an error is a row of its own, beside those that were there before it."""
    rows: list[Row] = []
    end = time.monotonic() + 60 * minutes
    for name in names:
        if time.monotonic() > end:
            rows.append(Row(name, "", f"left out: {minutes:g} minutes are over"))
            continue
        folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
        try:
            rows.extend(PARTS[name](Bench(sizes, device, folder)))
        except Exception as error:
            rows.append(failed(name, "", error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _release()
        print(f"{name}: done", file=sys.stderr)
    return rows


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        return f"{own.name}, {show_bytes(own.total_memory)}, torch {torch.__version__}"
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads), torch {torch.__version__}"


def table(rows: list[Row], title: str) -> str:
    """Markdown."""
    met = {True: "yes", False: "no", None: ""}
    lines = [f"{title}\n", "| part | what | found | goal | met |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.part} | {r.what} | {r.found} | {r.goal} | {met[r.met]} |" for r in rows)]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.md and gpu.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, for the tests")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after them")
    args = parser.parse_args(arguments)
    asked, skipped = args.parts.split(","), [x for x in args.skip.split(",") if x]
    if unknown := sorted({*asked, *skipped} - PARTS.keys()):
        parser.error(f"no such part: got {', '.join(unknown)}; some of {', '.join(PARTS)}")
    device, sizes, start = pick_device(args.device), SMALL if args.small else FULL, time.monotonic()
    rows = run([name for name in asked if name not in skipped], sizes, device, args.minutes)
    title = f"{machine(device)}; {time.monotonic() - start:.0f} s" + (", reduced form" if args.small else "")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.md").write_text(table(rows, title))
    told = {"device": machine(device), "sizes": sizes._asdict(), "rows": [asdict(row) for row in rows]}
    (args.out / "gpu.json").write_text(json.dumps(told, indent=1))
    print(table(rows, title))


if __name__ == "__main__":
    main()
