"""Ours against Kronfluence 1.0.1: the same job on both, in alternation in one process, phase by phase.

    make fixture                                      (once: installs Kronfluence into .venv)
    python benchmarks/against_kronfluence.py          GPT-NeoX type, 512 wide, 6 layers, 64 sequences of 256 tokens
    python benchmarks/against_kronfluence.py --sequences 8 --tokens 64 --queries 4 --repeats 1

Same weights, tokens, MLP layers, threads and batch size, float32, empirical Fisher, damping 0.1 x the mean eigenvalue, SDPA
attention.  Scoring counts everything after the fit: query gradients, solve, compression where a rank is given, and the pass
over the corpus; both write their factors and scores to disk.  Kronfluence takes every query in one pass (it holds the query
gradients of ``--query-batch`` queries while it makes them).  All sequences have the same length, so it needs no mask.

A ratio is their seconds over ours; "steps" are plain training steps (forward and full backward) over the same tokens.  The
Pearson correlation is of all scores at the same rank, theirs with the sign turned: at full rank both compute the same numbers,
at a low rank each truncates in its own way (Kronfluence by ``torch.svd_lowrank``, its default), so the last two columns tell
how near each is to *its own* full rank.
"""

import argparse
import copy
import gc
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import upriver as up
from upriver.influence.gradients import Measurements
from upriver.influence.stages import Job, divide, scan_stage, solve_stage
from upriver.model.load import Model
from upriver.model.sweep import tracked_layers
from upriver.runtime.config import TraceOptions
from upriver.runtime.progress import mute, silent
from upriver.runtime.store import Stage
from upriver.text.batch import Examples

FIT = ("covariance", "eigendecomposition", "correction")
MLP = ("dense_h_to_4h", "dense_4h_to_h")


class Sequences(Examples):
    """Random sequences of one length; the tokens after the first ``prompt`` carry loss."""

    def __init__(self, rows: int, length: int, vocabulary: int, prompt: int, seed: int):
        tokens_NT = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
        super().__init__({"tokens": tokens_NT, "loss": (torch.arange(length) >= prompt).repeat(rows, 1)})
        self.lengths_N = np.full(rows, length, np.int32)

    def items(self) -> list[dict[str, Tensor]]:
        tokens_NT, loss_NT = self.inputs["tokens"], self.inputs["loss"]
        return [{"tokens": tokens, "loss": loss} for tokens, loss in zip(tokens_NT, loss_NT, strict=True)]


class SumOfLogProbs(Task):
    """Kronfluence's side of the same loss and measurement: sums over tokens."""

    def __init__(self, layers: int):
        self.layers = layers

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
        labels = torch.where(batch["loss"][:, 1:], batch["tokens"][:, 1:], -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return -self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return [f"gpt_neox.layers.{i}.mlp.{name}" for i in range(self.layers) for name in MLP]


class Scored(NamedTuple):
    seconds: float
    scores_NQ: np.ndarray  # I_f: positive raises the measurement


class Ours:
    def __init__(self, module: nn.Module, corpus: Sequences, folder: Path, args: argparse.Namespace):
        self.model, self.corpus, self.folder = Model(module), corpus, folder
        self.batch_tokens = args.batch * args.tokens

    def fit(self) -> dict[str, float]:
        self.factors, seconds = timed(
            lambda: up.fit(
                self.model, self.corpus, self.folder / "factors", fisher="empirical", batch_tokens=self.batch_tokens,
                max_tokens=None, overwrite=True,
            )
        )  # fmt: skip
        return {name: self.factors.manifest["timings"][name] for name in FIT} | {"fit": seconds}

    def score(self, queries: Sequences, rank: int | None) -> Scored:
        opts = TraceOptions(rank=rank or "full", batch_tokens=self.batch_tokens)

        def work(place: Path) -> np.ndarray:
            stage = Stage.open(place, "trace", {})
            layers = tracked_layers(self.model, self.corpus, "mlp")
            rows, asked = np.arange(len(self.corpus)), Measurements(queries)
            split = divide(self.model, layers, self.corpus, asked, opts, "float32")
            job = Job(stage, self.model, layers, self.corpus, asked, self.factors, rows, opts, silent, split)
            return scan_stage(job, solve_stage(job), mute).scores_NQ[:]

        with tempfile.TemporaryDirectory(
            dir=self.folder
        ) as place:  # a folder of its own: nothing is left to resume from
            scores_NQ, seconds = timed(lambda: work(Path(place)))
        return Scored(seconds, scores_NQ)


class Theirs:
    def __init__(self, module: nn.Module, corpus: Sequences, folder: Path, args: argparse.Namespace):
        task = SumOfLogProbs(args.layers)
        self.corpus, self.batch, self.query_batch = corpus.items(), args.batch, args.query_batch
        model = prepare_model(module, task)
        self.analyzer = Analyzer(
            "job", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )

    def fit(self) -> dict[str, float]:
        common = {"factors_name": "factors", "overwrite_output_dir": True}
        data = {"dataset": self.corpus, "per_device_batch_size": self.batch}
        factor_args = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        phases = (
            lambda: self.analyzer.fit_covariance_matrices(**common, **data, factor_args=factor_args),
            lambda: self.analyzer.perform_eigendecomposition(**common, factor_args=factor_args),
            lambda: self.analyzer.fit_lambda_matrices(**common, **data, factor_args=factor_args),
        )
        seconds = {name: timed(work)[1] for name, work in zip(FIT, phases, strict=True)}
        return seconds | {"fit": sum(seconds.values())}

    def score(self, queries: Sequences, rank: int | None) -> Scored:
        size = min(self.query_batch, len(queries))
        score_args = ScoreArguments(
            damping_factor=None,
            query_gradient_low_rank=rank,
            query_gradient_accumulation_steps=-(-len(queries) // size),
        )

        def work() -> Tensor:
            self.analyzer.compute_pairwise_scores(
                "scores", "factors", query_dataset=queries.items(), train_dataset=self.corpus,
                per_device_query_batch_size=size, per_device_train_batch_size=self.batch, score_args=score_args,
                overwrite_output_dir=True,
            )  # fmt: skip
            return self.analyzer.load_pairwise_scores("scores")["all_modules"]

        scores_QN, seconds = timed(work)
        return Scored(seconds, -scores_QN.T.numpy())


def timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def training_step(model: Model, corpus: Sequences, batch_tokens: int) -> None:
    """A plain forward and full backward pass over the corpus, every parameter with a gradient."""
    model.module.train()
    for rows in corpus.plan(batch_tokens):
        model.task.loss(model.module, corpus.batch(rows)).backward()
        model.module.zero_grad(set_to_none=True)
    model.module.eval()


def make_module(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64, tie_word_embeddings=False,
        max_position_embeddings=max(args.tokens, args.query_tokens),
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


class Runs:
    """Seconds of every phase and side, over the repeats."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def add(self, phase: str, side: str, seconds: float) -> None:
        self.seconds.setdefault((phase, side), []).append(seconds)

    def median(self, phase: str, side: str) -> float:
        return statistics.median(self.seconds[phase, side])

    def ratio(self, phase: str) -> float:
        """Median over the repeats of their seconds over ours, each from the same repeat."""
        pairs = zip(self.seconds[phase, "theirs"], self.seconds[phase, "ours"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def phase_name(queries: int, rank: int | None) -> str:
    return f"scoring, {queries} queries, " + ("full rank" if rank is None else f"rank {rank}")


def run(args: argparse.Namespace, folder: Path) -> tuple[Runs, dict[tuple[str, str], np.ndarray]]:
    runs, found = Runs(), {}
    module = make_module(args)
    corpus = Sequences(args.sequences, args.tokens, args.vocabulary, 1, seed=1)
    asked = [Sequences(q, args.query_tokens, args.vocabulary, args.query_tokens // 2, seed=2) for q in args.queries]
    sides = {  # Kronfluence wraps the modules that it is given: it gets a copy
        "ours": Ours(module, corpus, folder / "ours", args),
        "theirs": Theirs(copy.deepcopy(module), corpus, folder / "theirs", args),
    }
    ours = sides["ours"]
    training_step(ours.model, corpus, ours.batch_tokens)  # warm up
    gc.collect()
    gc.freeze()  # Kronfluence collects garbage around each phase: 0.4 s a time over what both sides import, unless set aside
    for repeat in range(args.repeats):
        order = list(sides.items())[:: -1 if repeat % 2 else 1]
        runs.add("step", "plain", timed(lambda: training_step(ours.model, corpus, ours.batch_tokens))[1])
        for side, system in order:
            for phase, seconds in system.fit().items():
                runs.add(phase, side, seconds)
        for queries in asked:
            for rank in args.ranks:
                for side, system in order:
                    phase = phase_name(len(queries), rank)
                    scored = system.score(queries, rank)
                    runs.add(phase, side, scored.seconds)
                    found[phase, side] = scored.scores_NQ
    return runs, found


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def print_times(runs: Runs) -> None:
    step = runs.median("step", "plain")
    print("| phase | ours, s | theirs, s | ratio | ours, steps | theirs, steps |\n|---|---|---|---|---|---|")
    for phase in dict.fromkeys(phase for phase, side in runs.seconds if side == "ours"):
        ours, theirs = (runs.median(phase, side) for side in ("ours", "theirs"))
        label = "**fit in all**" if phase == "fit" else phase
        print(
            f"| {label} | {ours:.2f} | {theirs:.2f} | {runs.ratio(phase):.2f} | {ours / step:.2f} | {theirs / step:.2f} |"
        )
    print(f"\nplain training step: {step:.2f} s")


def print_scores(found: dict[tuple[str, str], np.ndarray], args: argparse.Namespace) -> None:
    columns = "Pearson | largest difference / range | ours to our full rank | theirs to their full rank"
    print(f"\n| scores | {columns} |\n|---|---|---|---|---|")
    for queries in args.queries:
        for rank in args.ranks:
            ours, theirs = (found[phase_name(queries, rank), side] for side in ("ours", "theirs"))
            own = ["", ""]
            if rank is not None and None in args.ranks:
                whole = phase_name(queries, None)
                own = [f"{pearson(found[whole, s], x):.6f}" for s, x in (("ours", ours), ("theirs", theirs))]
            gap = np.abs(ours - theirs).max() / np.ptp(theirs)
            label = phase_name(queries, rank).removeprefix("scoring, ")
            print(f"| {label} | {pearson(ours, theirs):.8f} | {gap:.1e} | {own[0]} | {own[1]} |")


def rank_of(text: str) -> int | None:
    return None if text == "full" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--queries", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--query-tokens", type=int, default=32, help="of prompt and completion, half each")
    parser.add_argument("--ranks", type=rank_of, nargs="+", default=[None, 32], help="numbers, or full")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch, on both sides")
    parser.add_argument("--query-batch", type=int, default=16, help="queries in a batch of Kronfluence")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
    with tempfile.TemporaryDirectory() as folder:
        runs, found = run(args, Path(folder))
    print(
        f"GPT-NeoX type, {args.width} wide, {args.layers} layers, vocabulary {args.vocabulary:,}; {args.sequences} sequences of "
        f"{args.tokens} tokens; float32, {args.threads} threads, median of {args.repeats}\n"
    )
    print_times(runs)
    print_scores(found, args)


if __name__ == "__main__":
    main()
