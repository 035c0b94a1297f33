"""Interrupted, refused, replaced, reused: what a stage's folder does to a run, at every point where something is committed.

``kill_resume.py`` shows the same with SIGKILL on the demo.
"""

import errno
import json
import os
from collections.abc import Callable
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from upriver.runtime.sums import accumulate

from in_memory import TokenCorpus, TokenQueries
from upriver.curvature.fit import Factors, fit, fit_diagonal
from upriver.errors import ConfigError, MismatchError, StorageError
from upriver.influence import stages
from upriver.model import sweep
from upriver.model.load import Model
from upriver.pipeline import trace
from upriver.runtime import artifact, dist, sums
from upriver.runtime.artifact import Artifact, locked
from upriver.runtime.config import CONVENTIONS, FitOptions, TraceOptions

GIVEN = {"batch_tokens": 40}
ENDED = 2**22 + 1  # no process has such a number


class Died(BaseException):
    """What a kill looks like from inside: nothing catches it."""


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr(sweep, "UNIT_TOKENS", 60)
    monkeypatch.setattr(stages, "UNIT_TOKENS", 60)


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
    options = {"rank": 4, "top": 3, **GIVEN, **of_trace}
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "UNIT_TOKENS", 60)
        patch.setattr(stages, "UNIT_TOKENS", 60)
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


def killed(monkeypatch, room: int, work: Callable[[], object], after: bool = False) -> None:
    """Let ``work`` die when it has committed ``room`` files."""
    with monkeypatch.context() as patch:
        Count(patch, room, after)
        with pytest.raises(Died):
            work()


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
def test_dying_at_every_commit_changes_nothing(after: bool, alone, tmp_path, monkeypatch):
    """Each process commits one file and dies at the next: together they make what one makes, and no unit twice.

    The tables at the end are one unit of several files: where a process gets no further, the next may commit one more.
    """
    room, attempts = (0 if after else 1), []
    for _ in range(100):
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
    units = [name for names in attempts for name in names if name.split("/")[-1].startswith(("sum-", "unit-"))]
    assert len(units) > 20
    assert len(units) == len(set(units))


def test_what_a_killed_process_left_half_written_is_removed(alone, tmp_path, monkeypatch):
    killed(monkeypatch, 6, lambda: run(tmp_path))
    sums = next((tmp_path / "factors" / "covariance").glob("layers-*"))
    half = [
        tmp_path / "factors" / f".key.json.{ENDED}.tmp",
        sums / f".sum-000009.safetensors.{ENDED}.tmp",
    ]
    for path in half:
        path.write_bytes(b"half")
    stale = sums / "sum-000000.safetensors"
    stale.write_bytes(b"of a kill between the next sum and its removal")
    run(tmp_path)
    assert results(tmp_path) == alone


def test_factors_killed_before_their_last_step_are_tidied_when_used(alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("upriver.curvature.fit._tidy", lambda folder: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            run(tmp_path)
    assert (tmp_path / "factors" / "covariance").exists()
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
def test_every_option_but_the_memory_is_in_the_key(kind):
    """Whatever is added: a result that depends on it would otherwise be handed out for another value."""
    assert kind().key().keys() == kind.model_fields.keys() - {"memory"}


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
    killed(monkeypatch, 5, lambda: run(tmp_path))
    with pytest.raises(MismatchError, match=r"another options\.seed: got 1 now, 0 then"):
        run(tmp_path, seed=1)


def test_a_finished_folder_is_used_as_it_is_and_says_so(alone, tmp_path):
    run(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    said = []
    factors = fit(tiny_model(), tiny_corpus(), tmp_path / "factors", say=said.append, **GIVEN)
    options = {"rank": 4, "top": 3, **GIVEN}
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


@pytest.mark.parametrize("files", range(0, 45, 5))
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
    killed(monkeypatch, 2, lambda: fit_diagonal(model, corpus, factors[0]), after=True)
    for each in factors:
        fit_diagonal(model, corpus, each)
    assert results(tmp_path / "killed") == results(tmp_path / "alone")
    assert Factors(tmp_path / "killed").block("model.layers.0.mlp.up_proj", "diagonal").lam_OI.min() >= 0


@pytest.mark.parametrize(
    ("share", "after"),
    [(0.0, False), (1e9, True)],
    ids=["sums written at the ends, before the rename", "sums written after each unit, after the rename"],
)
def test_sums_held_in_memory_have_the_same_bits(share: float, after: bool, alone, tmp_path, monkeypatch):
    """As on an accelerator, in one process that goes through, and in others that die after more and more commits."""
    monkeypatch.setattr("upriver.curvature.fit._in_memory", lambda work, group: True)
    monkeypatch.setattr(sums, "COMMIT_SHARE", share)
    run(tmp_path / "through")
    assert results(tmp_path / "through") == alone
    for room in range(1, 100):  # the tables at the end are one unit of several files
        with monkeypatch.context() as patch:
            Count(patch, room, after)
            try:
                run(tmp_path / "killed")
            except Died:
                continue
        break
    assert results(tmp_path / "killed") == alone


@pytest.mark.parametrize("share", [0.0, 1e9])
def test_what_is_held_goes_on_from_the_newest_sum(share: float, tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "COMMIT_SHARE", share)
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    stage, computed = Artifact.open(tmp_path, "sum", {}), []

    def compute(unit: int) -> artifact.Tensors:
        if unit == 4 and 4 not in computed:
            computed.append(unit)
            raise Died
        computed.append(unit)
        return {"x": values[unit].clone()} | ({"late": torch.ones(1)} if unit > 1 else {})

    with pytest.raises(Died):
        accumulate(stage, list(range(6)), 6, compute, hold=True)
    kept = 4 if share else 1
    assert [p.name for p in tmp_path.glob("sum-*")] == [f"sum-{kept:06d}.safetensors"]
    total = artifact.read_tensors(accumulate(stage, list(range(6)), 6, compute, hold=True))
    assert computed == [0, 1, 2, 3, 4, *range(kept, 6)]
    assert total["late"] == 4
    assert [p.name for p in tmp_path.glob("sum-*")] == ["sum-000006.safetensors"]
    expected = values[0]
    for value in values[1:]:
        expected = expected + value
    assert torch.equal(total["x"], expected)


@pytest.mark.parametrize("n_units", [1, 2, 5, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("died", [0, 1, 2])
def test_ranks_that_stop_anywhere_add_up_to_the_same_sum(died: int, ranks: int, n_units: int, tmp_path, monkeypatch):
    """Some ranks commit their units and die; then any number of ranks goes on, here in one process, as if side by side."""
    values = torch.randn(n_units, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(4)
    for value in values:
        expected = expected + value
    stage, computed, most = Artifact.open(tmp_path, "sum", {}), [], 0

    def compute(unit: int) -> artifact.Tensors:
        computed.append(unit)
        return {"x": values[unit].clone()} | ({"late": torch.ones(1)} if unit > 1 else {})

    for unit in range(n_units)[died::3]:  # what an earlier run on three ranks left
        stage.commit(unit, compute(unit))
    shares = [list(range(rank, n_units, ranks)) for rank in range(ranks)]
    late = [u for turn in zip_longest(*shares[1:]) for u in turn if u is not None and not stage.has(u)]
    arrivals = iter(late if ranks > 1 else [])

    def meanwhile(
        unit: int,
    ) -> artifact.Tensors:  # each of the others finishes a unit for each that the first one makes
        nonlocal most
        most = max(most, len(list(stage.path.glob("unit-*"))))
        for other in islice(arrivals, ranks - 1):
            stage.commit(other, compute(other))
        return compute(unit)

    barriers = iter([[], arrivals, []])  # at the second one the others are done
    with monkeypatch.context() as patch:
        patch.setattr(dist, "barrier", lambda: [stage.commit(u, compute(u)) for u in next(barriers)])
        path = accumulate(stage, shares[0], n_units, meanwhile)
    total = artifact.read_tensors(path)
    assert torch.equal(total["x"], expected)
    assert float(total.get("late", torch.zeros(1))) == max(0, n_units - 2)
    assert sorted(computed) == list(range(n_units))
    assert len(shares[0]) == n_units or not list(stage.path.glob("unit-*"))
    assert ranks == 1 or most <= ranks + len(range(n_units)[died::3])
    for share in shares[1:]:
        again = accumulate(stage, share, n_units, compute)
        assert torch.equal(artifact.read_tensors(again)["x"], total["x"])
    assert len(computed) == n_units


def test_a_part_that_is_missing_is_told(tmp_path):
    stage = Artifact.open(tmp_path, "sum", {})
    with pytest.raises(StorageError, match="missing"):
        accumulate(stage, [0, 2], 4, lambda unit: {"x": torch.ones(1)})


def test_factors_that_are_replaced_during_a_trace_are_refused(tmp_path):
    model, corpus = tiny_model(), tiny_corpus()
    factors = fit(model, corpus, tmp_path / "factors")
    fit(model, corpus, tmp_path / "factors", seed=5, overwrite=True)
    with pytest.raises(MismatchError, match="were replaced while they were in use"):
        factors.check_unchanged()
    Factors(tmp_path / "factors").check_unchanged()
