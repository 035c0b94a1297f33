"""Interrupted, refused, replaced, reused: what a stage's folder does to a run, at every point where something is committed.

``kill_resume.py`` shows the same with SIGKILL and SIGTERM on the demo.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import upriver
from hook_cases import in_processes
from in_memory import TokenCorpus, TokenQueries
from upriver.curvature.diagonal import fit_diagonal
from upriver.curvature.fit import Factors, fit
from upriver.errors import ConfigError, MismatchError, StorageError
from upriver.model.load import Model
from upriver.pipeline import trace
from upriver.runtime import artifact, dist
from upriver.runtime.artifact import Artifact, Tensors, locked, read_tensors
from upriver.runtime.config import CONVENTIONS, FitOptions, TraceOptions
from upriver.runtime.units import Stopped, each, stop, total

GIVEN = {"batch_tokens": 40, "unit_tokens": 60}
CPU = torch.device("cpu")
ENDED = 2**22 + 1  # no process has such a number


class Died(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def tiny_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config))


def tiny_corpus(seed: int = 0) -> TokenCorpus:
    rng = np.random.default_rng(seed)
    return TokenCorpus([rng.integers(0, 23, rng.integers(4, 13)) for _ in range(24)])


def tiny_queries() -> TokenQueries:
    rng = np.random.default_rng(9)
    return TokenQueries([rng.integers(0, 23, 8) for _ in range(3)], [4, 5, 6])


def run(folder: Path, overwrite: bool = False, **given) -> None:
    """Fit and trace into ``folder``; ``rank`` and ``damping`` are the trace's, the others the fit's."""
    of_trace = {name: given.pop(name) for name in ("rank", "damping") if name in given}
    model, corpus = given.pop("model", None) or tiny_model(), given.pop("corpus", None) or tiny_corpus()
    factors = fit(model, corpus, folder / "factors", overwrite=overwrite, **GIVEN, **given)
    options = {"rank": 4, "top": 3, "held_out": 0, **GIVEN, **of_trace}
    trace(model, corpus, tiny_queries(), factors, folder / "scores", overwrite=overwrite, **options)


def results(folder: Path) -> dict[str, bytes]:
    """Every file but the locks; manifests without timings and the checksum over them."""
    found = {}
    for path in (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"):
        content = path.read_bytes()
        if path.name == "manifest.json":
            content = json.dumps(
                {k: v for k, v in json.loads(content).items() if k not in ("timings", "digest")}
            ).encode()
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    run(folder)
    return results(folder)


class Count:
    """``os.replace`` that lets ``room`` files be committed and then dies, before or after the next one is."""

    def __init__(self, monkeypatch, room: int, after: bool):
        self.room, self.after, self.replace, self.names = room, after, os.replace, []
        monkeypatch.setattr(artifact.os, "replace", self)

    def __call__(self, temporary, path) -> None:
        if len(self.names) == self.room and not self.after:
            raise Died
        self.replace(temporary, path)
        self.names.append("/".join(path.parts[-3:]))
        if len(self.names) > self.room:
            raise Died


def killed(monkeypatch, room: int, work: Callable[[], object], after: bool = False) -> bool:
    """Let ``work`` die when it has committed ``room`` files; False when it was done before."""
    with monkeypatch.context() as patch:
        Count(patch, room, after)
        try:
            work()
        except Died:
            return True
    return False


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
def test_dying_at_every_commit_changes_nothing(after: bool, alone, tmp_path, monkeypatch):
    """Each process commits one file and dies at the next: together they make what one makes, and no unit twice.

    The tables at the end are one unit of several files: where a process gets no further, the next may commit one more.
    """
    room, attempts = (0 if after else 1), []
    for _ in range(150):
        with monkeypatch.context() as patch:
            count = Count(patch, room, after)
            try:
                run(tmp_path)
            except Died:
                room += bool(attempts) and count.names == attempts[-1]
                attempts.append(count.names)
                continue
        break
    assert results(tmp_path) == alone
    units = [name for names in attempts for name in names if name.split("/")[-1].startswith("unit-")]
    assert len(units) > 10
    assert len(units) == len(set(units))


def test_what_a_killed_process_left_half_written_is_removed(alone, tmp_path, monkeypatch):
    assert killed(monkeypatch, 3, lambda: run(tmp_path))
    for half in (f".key.json.{ENDED}.tmp", f"covariance/.sum-0-of-1.safetensors.{ENDED}.tmp"):
        (tmp_path / "factors" / half).write_bytes(b"half")
    run(tmp_path)
    assert results(tmp_path) == alone


CHANGES = {
    "model": lambda: {"model": tiny_model(1)},
    "corpus": lambda: {"corpus": tiny_corpus(1)},
    "options.seed": lambda: {"seed": 1},
    "options.fisher": lambda: {"fisher": "empirical"},
    "options.layers": lambda: {"layers": "attention"},
    "options.damping": lambda: {"damping": "0.2x"},
    "options.rank": lambda: {"rank": 5},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_refused_with_the_first_difference(name: str, alone, tmp_path):
    change = CHANGES[name]()
    run(tmp_path)
    with pytest.raises(MismatchError, match=rf"another {name}: got .* now, .* then; .*--overwrite"):
        run(tmp_path, **change)
    assert results(tmp_path) == alone, "a refusal leaves everything as it is"
    run(tmp_path, overwrite=True, **change)
    replaced = results(tmp_path)
    run(tmp_path / "fresh", **change)
    assert replaced == results(tmp_path / "fresh")
    assert replaced != alone


@pytest.mark.parametrize("kind", [FitOptions, TraceOptions])
def test_every_option_but_those_that_divide_the_work_is_in_the_key(kind):
    """Whatever is added: a result that depends on it would otherwise be handed out for another value."""
    assert kind().key().keys() == kind.model_fields.keys() - {"memory", "unit_tokens"}


def test_factors_of_other_conventions_are_refused(tmp_path, monkeypatch):
    model, corpus = tiny_model(), tiny_corpus()
    factors = fit(model, corpus, tmp_path / "factors", **GIVEN)
    monkeypatch.setitem(CONVENTIONS, "loss", "a mean over tokens")
    with pytest.raises(MismatchError, match=r"another conventions\.loss: got 'a mean over tokens' now, 'sum of"):
        fit(model, corpus, tmp_path / "factors", **GIVEN)
    with pytest.raises(MismatchError, match=r"fitted with another conventions: got .*'a mean over tokens'"):
        trace(model, corpus, tiny_queries(), factors, tmp_path / "scores", **GIVEN)
    assert not (tmp_path / "scores").exists()


def test_unfinished_work_of_other_inputs_is_not_taken_over(tmp_path, monkeypatch):
    assert killed(monkeypatch, 5, lambda: run(tmp_path))
    with pytest.raises(MismatchError, match=r"another options\.seed: got 1 now, 0 then"):
        run(tmp_path, seed=1)


@pytest.mark.parametrize("room", [5, 12, 18])
def test_unfinished_work_in_units_of_another_size_is_begun_again(room: int, alone, tmp_path, monkeypatch):
    """Its sums and its units would be of other rows."""
    model, corpus, small = tiny_model(), tiny_corpus(), {"unit_tokens": 24, "batch_tokens": 40}
    assert killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "factors", **small)) or room > 12
    run(tmp_path)
    again, once = results(tmp_path), alone
    assert again.keys() == once.keys()
    assert killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "other", **small)) or room > 12
    fit(model, corpus, tmp_path / "other", **small)
    for name in (x.name for x in Factors(tmp_path / "other").layers):
        lam = [Factors(tmp_path / folder).block(name).lam_OI for folder in ("other", "factors")]
        torch.testing.assert_close(*lam, rtol=1e-4, atol=1e-4 * float(lam[0].max()))


def test_a_finished_folder_is_used_as_it_is_and_says_so(alone, tmp_path):
    run(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    said = []
    factors = fit(tiny_model(), tiny_corpus(), tmp_path / "factors", say=said.append, **GIVEN)
    options = {"rank": 4, "top": 3, "held_out": 0, **GIVEN}
    trace(tiny_model(), tiny_corpus(), tiny_queries(), factors, tmp_path / "scores", say=said.append, **options)
    assert [line.split(": ")[0] for line in said] == ["factors", "layers", "convergence", "scores", "layers"]
    assert all(line.endswith("is complete and was made from the same inputs; used as it is") for line in said[::3])
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}


@pytest.mark.parametrize("deaths", range(0, 12, 2))
def test_an_overwrite_that_dies_can_be_given_again(deaths: int, alone, tmp_path, monkeypatch):
    """Whatever was removed by then, the folder is still ours and never looks finished."""
    run(tmp_path, seed=1)
    left = [deaths]

    def dying(remove):
        def step(*args, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return remove(*args, **named)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(artifact.os, "rmdir", dying(os.rmdir))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(Died):
            run(tmp_path, overwrite=True)
    run(tmp_path, overwrite=True)
    assert results(tmp_path) == alone


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    for name, content in (("notes.txt", "mine"), ("key.json", '{"private": 1}'), ("key.json", "[1]")):
        folder = tmp_path / content
        folder.mkdir()
        (folder / name).write_text(content)
        (folder / ".draft.txt.1.tmp").write_text("mine too")
        with pytest.raises(MismatchError, match="not an artifact of this program"):
            fit(tiny_model(), tiny_corpus(), folder, overwrite=True)
        assert (folder / name).read_text() == content
        assert (folder / ".draft.txt.1.tmp").read_text() == "mine too"
        assert not (folder / ".lock").exists()


@pytest.mark.parametrize("verb", ["factors", "scores"])
def test_two_runs_into_one_folder_are_refused(verb: str, alone, tmp_path):
    with locked(tmp_path / verb), pytest.raises(ConfigError, match=f"another run is writing to .*{verb}; wait"):
        run(tmp_path)
    run(tmp_path)
    assert results(tmp_path) == alone


@pytest.mark.parametrize("files", range(0, 30, 4))
def test_disk_full_is_one_error_and_the_run_goes_on_afterwards(files: int, alone, tmp_path, monkeypatch):
    left, sync = [files], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(artifact.os, "fsync", full)
        with pytest.raises(StorageError, match=r"disk is full.*same command") as caught:
            run(tmp_path)
    assert caught.value.exit_status == 1
    assert not list(tmp_path.rglob("*.tmp"))
    run(tmp_path)
    assert results(tmp_path) == alone


def test_diagonal_is_measured_once_and_goes_on(tmp_path, monkeypatch):
    model, corpus = tiny_model(), tiny_corpus()
    factors = [fit(model, corpus, tmp_path / name, **GIVEN) for name in ("killed", "alone")]
    assert killed(monkeypatch, 2, lambda: fit_diagonal(model, corpus, factors[0]), after=True)
    for one in factors:
        fit_diagonal(model, corpus, one)
    assert results(tmp_path / "killed") == results(tmp_path / "alone")
    assert Factors(tmp_path / "killed").block("model.layers.0.mlp.up_proj", "diagonal").lam_OI.min() >= 0


VALUES = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def add_to(computed: list[int], dies_at: int | None = None) -> Callable[[int, Tensors], None]:
    """Adds a row of ``VALUES``, and notes which; may die once."""

    def add(unit: int, sums: Tensors) -> None:
        if unit == dies_at and unit not in computed:
            computed.append(unit)
            raise Died
        computed.append(unit)
        sums["x"] = sums.get("x", torch.zeros(4)) + VALUES[unit]

    return add


@pytest.mark.parametrize("dies_at", range(7))
def test_a_sum_goes_on_after_the_last_unit_that_was_committed(dies_at: int, tmp_path):
    stage, computed = Artifact.open(tmp_path, "sum", {}), []
    with pytest.raises(Died):
        total(stage, 7, add_to(computed, dies_at), CPU)
    written = int(read_tensors(tmp_path / "sum-0-of-1.safetensors")["units"]) if dies_at else 0
    found = read_tensors(total(stage, 7, add_to(computed, dies_at), CPU))
    assert computed == [*range(dies_at + 1), *range(written, 7)]
    assert int(found["units"]) == 7
    expected = VALUES[0]
    for value in VALUES[1:]:
        expected = expected + value
    assert torch.equal(found["x"], expected)
    total(stage, 7, add_to(computed), CPU)
    assert len(computed) == dies_at + 1 + 7 - written, "what is finished is added up no more"


def test_a_kill_costs_a_few_cheap_units_at_most(tmp_path):
    """Sums are written when writing took little of the time since they were written last: at the latest with the last unit."""
    stage, computed = Artifact.open(tmp_path, "sum", {}), []
    path = total(stage, 7, add_to(computed), CPU)
    assert [p.name for p in tmp_path.iterdir()] == ["key.json", path.name] or len(list(tmp_path.iterdir())) == 2
    assert computed == list(range(7))


@pytest.mark.parametrize("loop", ["each", "total"])
def test_a_run_that_is_asked_to_stop_finishes_its_unit_and_goes_on_later(loop: str, tmp_path):
    stage, computed, asked = Artifact.open(tmp_path, "sum", {}), [], [2]

    def compute(unit: int) -> Tensors:
        computed.append(unit)
        if unit in asked:
            asked.remove(unit)
            stop()
        return {"x": VALUES[unit].clone()}

    def add(unit: int, sums: Tensors) -> None:
        sums["x"] = sums.get("x", torch.zeros(4)) + compute(unit)["x"]

    def go() -> object:
        return each(stage, 7, compute) if loop == "each" else total(stage, 7, add, CPU)

    with pytest.raises(Stopped, match="same command goes on") as caught:
        go()
    assert caught.value.exit_status == 75
    go()
    assert computed == list(range(7))
    with pytest.raises(Stopped):  # where no unit is in hand there is nothing to wait for
        stop()
    go()
    assert computed == list(range(7))


def add_up_on_two(rank: int, folder: Path) -> None:
    """Two processes add up their own units; the second time they are done."""
    stage, computed = Artifact.open(folder / "sum", "sum", {}), []
    for _ in range(2):
        path = total(stage, 7, add_to(computed), CPU)
        expected = (VALUES[0] + VALUES[2] + VALUES[4] + VALUES[6]) + (VALUES[1] + VALUES[3] + VALUES[5])
        assert torch.equal(read_tensors(path)["x"], expected), "in unit order by process, in the order of processes"
        assert int(read_tensors(path)["units"]) == 7
        assert computed == dist.dealt(7)


def test_processes_add_up_their_own_units_and_then_their_sums(tmp_path):
    in_processes(2, add_up_on_two, tmp_path)
    computed: list[int] = []
    stage = Artifact.open(tmp_path / "sum", "sum", {})
    one = read_tensors(total(stage, 7, add_to(computed), CPU))  # another number of processes: its own sum
    assert computed == list(range(7))
    torch.testing.assert_close(one["x"], VALUES.sum(0))


def test_factors_that_are_replaced_during_a_trace_are_refused(tmp_path):
    model, corpus = tiny_model(), tiny_corpus()
    factors = fit(model, corpus, tmp_path / "factors")
    fit(model, corpus, tmp_path / "factors", seed=5, overwrite=True)
    with pytest.raises(MismatchError, match="were replaced while they were in use"):
        factors.check_unchanged()
    Factors(tmp_path / "factors").check_unchanged()


def test_the_command_that_gets_sigterm_ends_with_status_75_and_goes_on(tmp_path):
    """Sent when the first sums are committed; what the second run makes is what one alone makes."""
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    model = str(Path(upriver.__file__).parent / "demo" / "speech-model")
    lines = [
        json.dumps({"text": "the people of the united states and the state of the union " * 6 + str(i)})
        for i in range(16)
    ]
    corpus.write_text("\n".join(lines))
    env = os.environ | {"UPRIVER_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen:
        args = ["fit", model, str(corpus), "--out", str(folder), "--seq-len", "64", "--batch-tokens", "64"]
        return subprocess.Popen(
            [sys.executable, "-m", "upriver.cli", *args],
            env=env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    process = start(out)
    while process.poll() is None and not list(out.glob("*/key.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    complaint = process.communicate()[1]
    assert process.returncode == 75, complaint
    assert "error: stopped; what was finished is kept" in " ".join(complaint.split())
    assert not (out / "manifest.json").exists()
    for folder in (out, tmp_path / "alone"):
        process = start(folder)
        complaint = process.communicate()[1]
        assert process.returncode == 0, complaint
    assert results(out) == results(tmp_path / "alone")
