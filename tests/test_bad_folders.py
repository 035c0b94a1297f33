"""Bad folders, run files and failures through the command line: refused with the reason, and nothing lost or left in the way."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch

import cli_cases
from cli_cases import (
    QUERIES,
    RECORDS,
    Tiny,
    assert_one_error,
    broken_weights,
    build_fitted,
    fit,
    save_model,
    tiny_llama,
    trace,
    upriver,
)
from text_cases import write_jsonl
from upriver import cli
from upriver.curvature.fit import Factors
from upriver.model import load
from upriver.runtime import artifact
from upriver.runtime.artifact import locked
from upriver.show.scores import Scores

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return build_fitted(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def call(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    return lambda *args: upriver(capsys, monkeypatch, *args)


# ------------------------------------------------------------------------------------------------------- folders


def unfinished(tiny: Tiny, folder: Path) -> Path:
    folder.mkdir()
    (folder / "key.json").write_bytes((tiny.factors / "key.json").read_bytes())
    return folder


def strange_manifest(tiny: Tiny, folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text("[]")
    return folder


BAD_FACTORS = {
    "missing": (lambda tiny, folder: folder, ["no such folder of factors", "upriver fit"]),
    "unfinished": (unfinished, ["not finished", "upriver fit"]),
    "a strange manifest": (strange_manifest, ["not a folder of factors"]),
    "not factors": (lambda tiny, folder: tiny.model, ["not a folder of factors", "upriver fit"]),
}


@pytest.mark.parametrize("case", BAD_FACTORS)
def test_bad_factors(tiny, tmp_path, call, case):
    make, parts = BAD_FACTORS[case]
    folder = make(tiny, tmp_path / "factors")
    assert_one_error(call(*trace(tiny, tmp_path / "out", factors=folder)), 2, str(folder), *parts)
    assert not (tmp_path / "out").exists()


def test_factors_of_another_model_name_both_fingerprints(tiny, tmp_path, call):
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    model = save_model(tmp_path / "model", other)
    old = json.loads((tiny.factors / "key.json").read_text())["model"]
    ran = call(*trace(tiny, tmp_path / "out", model=model))
    assert_one_error(ran, 2, str(tiny.factors), "another model", f"'{old}' then", "fit again")
    assert not (tmp_path / "out").exists()


def test_factors_of_another_attention_kernel(tiny, tmp_path, call, monkeypatch):
    plain = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: plain(*args, attention="eager", **kwargs))
    ran = call(*trace(tiny, tmp_path / "out"))
    assert_one_error(ran, 2, "another kernel", "got 'eager' now, 'sdpa' then")


def test_output_of_another_run_is_refused_and_kept(tiny, tmp_path, call):
    out = tmp_path / "out"
    assert call(*trace(tiny, out)).status == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    ran = call(*trace(tiny, out, "--damping", "0.2x"))
    assert_one_error(ran, 2, str(out), "another options.damping: got '0.2x' now, '0.1x' then", "--overwrite")
    other = write_jsonl(tmp_path / "q.jsonl", QUERIES[:1])
    assert_one_error(call(*trace(tiny, out, queries=other)), 2, "another queries")
    other = write_jsonl(tmp_path / "c.jsonl", RECORDS[:3])
    assert_one_error(call(*trace(tiny, out, corpus=other)), 2, "another corpus")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"} == before
    assert "used as it is" in call(*trace(tiny, out)).err
    assert call(*trace(tiny, out, "--damping", "0.2x", "--overwrite")).status == 0
    assert json.loads((out / "manifest.json").read_text())["damping"] == "0.2x"


def test_overwrite_never_replaces_the_result_of_another_verb(tiny, tmp_path, call):
    assert call(*fit(tiny, tmp_path / "out")).status == 0
    ran = call(*trace(tiny, tmp_path / "out", "--overwrite", factors=tmp_path / "out"))
    assert_one_error(ran, 2, "another stage: got 'trace' now, 'fit' then", "choose another folder")
    assert call(*trace(tiny, tmp_path / "scores", factors=tmp_path / "out")).status == 0


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_a_foreign_folder_is_left_alone(tiny, tmp_path, call, flags):
    (tmp_path / "diary.txt").write_text("mine")
    ran = call(*fit(tiny, tmp_path, *flags))
    assert_one_error(ran, 2, "not empty", str(tmp_path), "choose another folder")
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["diary.txt"]
    assert (tmp_path / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("verb", ["fit", "trace"])
def test_unwritable_output(tiny, tmp_path, call, verb):
    (tmp_path / "file").write_text("mine")
    command = {"fit": fit, "trace": trace}[verb]
    for out in (tmp_path / "file" / "below", tmp_path / "file"):
        assert_one_error(call(*command(tiny, out)), 2, "cannot write", str(out), "choose a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_unwritable_cache(tiny, tmp_path, call, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "file" / "cache"))
    assert_one_error(call(*fit(tiny, tmp_path / "out")), 2, "the cache cannot be written", "UPRIVER_CACHE")


def test_diagonal_of_another_corpus_is_refused_before_anything_is_written(tiny, tmp_path, call):
    other = write_jsonl(tmp_path / "c.jsonl", RECORDS[:3])
    ran = call(*trace(tiny, tmp_path / "out", "--curvature", "diagonal", corpus=other))
    assert_one_error(ran, 2, str(tiny.factors), "another corpus", "fit again")
    assert call(*trace(tiny, tmp_path / "out", corpus=other)).status == 0


def test_zero_damping_of_a_singular_curvature_is_an_error(tiny, tmp_path, call):
    corpus = write_jsonl(tmp_path / "c.jsonl", RECORDS[-1:])
    factors, out = tmp_path / "factors", tmp_path / "out"
    assert call(*fit(tiny, factors, corpus=corpus)).status == 0
    for kind in ("ekfac", "kfac"):
        ran = call(*trace(tiny, out, "--damping", 0, "--curvature", kind, corpus=corpus, factors=factors))
        assert_one_error(ran, 1, "singular", "give a larger --damping")
    assert call(*trace(tiny, out, corpus=corpus, factors=factors)).status == 0


def test_damaged_factors_are_named(tiny, tmp_path, call):
    assert call(*fit(tiny, tmp_path / "factors")).status == 0
    path = tmp_path / "factors" / "correction" / "lam.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    ran = call(*trace(tiny, tmp_path / "out", factors=tmp_path / "factors"))
    assert_one_error(ran, 1, f"cannot read {path}", "fit again")


# ------------------------------------------------------------------------------------------------------- report, run


def half_a_trace(tiny: Tiny, folder: Path) -> Path:
    folder.mkdir()
    (folder / "key.json").write_text('{"stage": "trace"}')
    return folder


BAD_SCORES = {
    "missing": (lambda tiny, folder: folder, "no such folder of results"),
    "not scores": (lambda tiny, folder: tiny.model, "not a folder of results"),
    "factors": (lambda tiny, folder: tiny.factors, "not the result of a trace"),
    "unfinished": (half_a_trace, "the trace is not finished"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores(tiny, tmp_path, call, case):
    make, part = BAD_SCORES[case]
    folder = make(tiny, tmp_path / "scores")
    assert_one_error(call("report", folder, "--out", tmp_path / "page"), 2, part, str(folder), "upriver trace")
    assert not (tmp_path / "page").exists()


RUN = 'model = "m"\ncorpus = "c"\nqueries = "q"\nout = "o"\n'
BAD_RUNS = {
    "missing file": (None, ["cannot read the run file", "run.toml"]),
    "broken TOML": ("model = ", ["run.toml is not valid TOML"]),
    "not UTF-8": (b'model = "\xe9"', ["run.toml is not valid TOML"]),
    "unknown key": (RUN + "dampin = 1", ["run.toml: unknown option 'dampin'", "did you mean 'damping'?"]),
    "missing key": (RUN.replace("queries", "#"), ["run.toml: the option 'queries' is missing"]),
    "wrong type": (RUN + 'top = "ten"', ["run.toml: bad value for 'top'", "got 'ten'", "whole number"]),
    "true is no number": (RUN + "top = true", ["run.toml: bad value for 'top'", "got True", "whole number"]),
    "negative": (RUN + "max_tokens = -1", ["run.toml: bad value for 'max_tokens'", "got -1"]),
    "a list": (RUN + 'layers = ["mlp"]', ["run.toml: bad value for 'layers'", "got ['mlp']"]),
    "a flag that verify has not": (
        RUN + "verify = { tops = 1 }",
        ["verify: unknown option 'tops'", "did you mean 'top'?"],
    ),
    "verify is a table": (RUN + "verify = true", ["bad value for 'verify'", "got True", "table"]),
    "no queries there": (RUN, ["no such file or folder", "q"]),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_run_file(tmp_path, call, case):
    content, parts = BAD_RUNS[case]
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_error(call("run", tmp_path / "run.toml"), 2, *parts)


# ------------------------------------------------------------------------------------------------------- failures


class Full(NamedTuple):
    """``os.fsync`` that finds the disk full at one of its calls."""

    at: int
    calls: list[int]

    def __call__(self, file: int) -> None:
        self.calls.append(file)
        if len(self.calls) == self.at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")


def scores_of(folder: Path) -> bytes:
    return (folder / "scores.parquet").read_bytes()


def test_disk_full_at_any_moment(tiny, tmp_path, call, monkeypatch):
    """Some write of a whole run fails, early, midway or late; the same command then ends with the same scores."""
    run = tmp_path / "run.toml"

    def write_run(out: Path) -> None:
        places = {"model": tiny.model, "corpus": tiny.corpus, "queries": tiny.queries, "out": out}
        run.write_text("".join(f'{name} = "{place}"\n' for name, place in places.items()) + "seq_len = 16\ntop = 2\n")

    write_run(tmp_path / "plain")
    count = Full(-1, [])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", count)
        assert call("run", run).status == 0
    n = len(count.calls)
    for at in (0, 3, n // 2, n - 2):
        write_run(tmp_path / f"out{at}")
        monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / f"cache{at}"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Full(at, []))
            assert_one_error(call("run", run), 1, "the disk is full", str(tmp_path), "free some space")
        assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".tmp", ".partial"))]
        assert call("run", run).status == 0
        assert scores_of(tmp_path / f"out{at}" / "scores") == scores_of(tmp_path / "plain" / "scores")


def test_two_runs_into_one_folder(tiny, tmp_path, call):
    with locked(tmp_path / "out"):
        assert_one_error(call(*fit(tiny, tmp_path / "out")), 2, "another run is writing to", str(tmp_path / "out"))


def test_ctrl_c(tiny, tmp_path, call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("upriver.curvature.fit.Correction.begin", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert_one_error(call(*fit(tiny, tmp_path / "out")), 1, "interrupted", "the same command goes on")
    assert call(*fit(tiny, tmp_path / "out")).status == 0


def test_an_unforeseen_error_is_one_sentence_too(tiny, tmp_path, call, monkeypatch):
    monkeypatch.setattr(cli, "fit", lambda *args, **kwargs: {}["two\nlines"])
    ran = call(*fit(tiny, tmp_path / "out"))
    assert ran.status == 1
    assert ran.last_line.startswith("error: unexpected KeyError: ")
    assert "--debug" in ran.last_line
    shown = call("--debug", *fit(tiny, tmp_path / "out"))
    assert (shown.status, shown.last_line) == (1, ran.last_line)
    assert "Traceback" in shown.err


def test_debug_changes_no_exit_status(tiny, tmp_path, call):
    command = fit(tiny, tmp_path / "out", corpus=tmp_path / "nothing.jsonl")
    plain, shown = call(*command), call("--debug", *command)
    assert (shown.status, shown.last_line) == (plain.status, plain.last_line) == (2, plain.last_line)
    assert "Traceback" in shown.err


def test_a_plan_names_what_no_run_could_do(tiny, tmp_path, call):
    assert_one_error(call("plan", tiny.model, "100x64"), 2, "got 64", "at most 32 tokens")
    place = tmp_path / "nowhere" / "plan.json"
    assert_one_error(call("plan", tiny.model, "100x32", "--out", place), 2, "--out", "no folder", "nowhere")


def test_a_folder_whose_name_is_not_utf_8(tiny, tmp_path, call):
    """The fit is not lost at its end, where the manifest tells the path of the corpus."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    corpus = shutil.copy(tiny.corpus, folder / "corpus.jsonl")
    assert call(*fit(tiny, tmp_path / "out", corpus=corpus)).status == 0
    assert Factors(tmp_path / "out").manifest["data"]["path"] == str(corpus)


NOT_UTF_8 = os.fsdecode(b"caf\xe9")
NONE_FOR_ARROW = pytest.mark.parametrize(
    "name", [NOT_UTF_8, "run:1", "file:run"], ids=["not UTF-8", "a colon", "a scheme"]
)  # it takes a name with a colon for an address, and one of another encoding for none


@NONE_FOR_ARROW
def test_a_parquet_corpus_of_any_name(tiny, tmp_path, call, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir(name)
    with open(Path(name, "corpus.parquet"), "wb") as file:
        pd.DataFrame([{"text": r["text"]} for r in RECORDS if "text" in r]).to_parquet(file)
    ran = call(*fit(tiny, tmp_path / "out", corpus=Path(name, "corpus.parquet")))
    assert ran.status == 0, ran.err
    assert Factors(tmp_path / "out").manifest["data"]["documents"] == len(RECORDS) - 1  # one has no text


@pytest.mark.parametrize("name", ["run:1", "file:run"])
def test_results_in_a_folder_of_any_name(tiny, tmp_path, call, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir(name)
    ran = call(*trace(tiny, Path(name, "scores")))
    assert ran.status == 0, ran.err
    assert_whole(Path(name, "scores"), call)


@pytest.mark.parametrize("command", [fit, trace])
def test_a_folder_to_write_to_whose_name_is_not_utf_8_is_refused_first(command, tiny, tmp_path, call):
    ran = call(*command(tiny, tmp_path / NOT_UTF_8))
    assert (ran.status, (tmp_path / NOT_UTF_8).exists()) == (2, False)
    assert "error: the folder's name is not UTF-8" in ran.err
    assert ran.err.rstrip().endswith("'; choose another")


def test_results_that_were_moved_into_a_folder_of_any_name(tiny, tmp_path, call):
    assert call(*trace(tiny, tmp_path / "scores")).status == 0
    (tmp_path / NOT_UTF_8).mkdir()
    assert_whole((tmp_path / "scores").rename(tmp_path / NOT_UTF_8 / "scores"), call)


def assert_whole(scores: Path, call) -> None:
    assert call("report", scores).status == 0
    found = Scores(scores)
    assert found.top("people")["rank"].tolist() == [1, 2]
    assert len(found.frame()) == found.manifest["n_train"]
    assert len(found.documents()) == len(RECORDS)


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(artifact.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"), artifact.locked(tmp_path):
        pass


# ------------------------------------------------------------------------------------------------------- processes

COMMAND = [sys.executable, "-m", "upriver.cli"]


def start(tmp_path: Path, *args) -> subprocess.Popen:
    env = {**os.environ, "UPRIVER_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *map(str, args)], stdout=pipe, stderr=pipe, text=True, env=env, preexec_fn=heed)


@pytest.mark.slow
def test_as_processes(tiny, tmp_path):
    """With a real standard error and exit status: nothing of a library's own is printed around the sentence."""
    model = broken_weights(lambda w: w.pop(WEIGHT))(tiny, tmp_path / "model")
    cases = {
        "'no-such-model'": fit(tiny, tmp_path / "out", model="no-such-model"),
        WEIGHT: fit(tiny, tmp_path / "out", model=model),
    }
    running = {part: start(tmp_path, *args) for part, args in cases.items()}
    for part, child in running.items():
        out, err = child.communicate(timeout=120)
        assert_one_error(cli_cases.Ran(child.returncode, out, err), 2, part)
        assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_of_a_process(tiny, tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": f"{n} " + RECORDS[0]["text"]} for n in range(4000)])
    with start(tmp_path, *fit(tiny, tmp_path / "out", "--batch-tokens", 64, corpus=corpus)) as child:
        assert child.stderr
        heard = line = ""
        while not line.startswith("plan: "):  # the passes begin
            line = child.stderr.readline()
            assert line, heard
            heard += line
        child.send_signal(signal.SIGINT)
        heard += child.stderr.read()
    assert_one_error(cli_cases.Ran(child.returncode, "", heard), 1, "interrupted")
