"""Nothing changes under our feet, and nothing of anybody else's is removed or replaced."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch

import upriver as up
from cli_cases import (
    QUERIES,
    RECORDS,
    Tiny,
    assert_one_error,
    build_fitted,
    fit,
    save_model,
    tiny_llama,
    trace,
    upriver,
)
from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import ConfigError, CorpusError, InputError, StorageError
from upriver.runtime.artifact import SCHEMA, Artifact, check, locked, read_json, write_json, write_tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return build_fitted(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def call(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    return lambda *args: upriver(capsys, monkeypatch, *args)


def overwrite(file: Path, content: bytes) -> None:
    """In place, as ``cp`` does: whoever has the file open, or mapped, sees it."""
    with open(file, "r+b") as there:
        there.write(content)
        there.truncate()


# ---- weights and corpus


def other_weights(folder: Path) -> bytes:
    other = tiny_llama()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    return (save_model(folder, other) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("content", ["other", "nothing"])
def test_a_checkpoint_that_is_overwritten_changes_no_loaded_model(tmp_path, content):
    place = save_model(tmp_path / "model") / "model.safetensors"
    model = up.load_model(tmp_path / "model", device="cpu")
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    overwrite(place, other_weights(tmp_path / "other") if content == "other" else b"")
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert model.module.lm_head.weight is model.module.get_input_embeddings().weight, "tied weights stay tied"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files is Linux's")
def test_no_weight_stays_mapped(tmp_path):
    place = save_model(tmp_path / "model")
    model = up.load_model(place, device="cpu")
    assert str(place) not in Path("/proc/self/maps").read_text()
    assert model.n_parameters


def numbers(scores: up.Scores) -> list[str]:
    return [scores.frame().to_json(), *(scores.top(q["id"], 2).to_json() for q in QUERIES)]


@pytest.fixture
def mine(tiny, tmp_path) -> Tiny:
    """The same inputs and factors, to be overwritten."""
    return Tiny(Path(shutil.copytree(tiny.root, tmp_path / "mine")), *(
        tmp_path / "mine" / place.name for place in (tiny.model, tiny.corpus, tiny.queries)
    ))  # fmt: skip


@pytest.mark.parametrize("what", ["weights", "corpus"])
def test_a_trace_given_twice_with_an_input_overwritten_in_between_is_refused(mine, tmp_path, call, what):
    command = trace(mine, tmp_path / "out")
    assert call(*command).status == 0
    before = numbers(up.Scores(tmp_path / "out"))
    if what == "weights":
        overwrite(mine.model / "model.safetensors", other_weights(tmp_path / "other"))
        assert_one_error(call(*command), 2, "fitted with another model")
    else:
        at = os.stat(mine.corpus)
        overwrite(mine.corpus, mine.corpus.read_bytes().replace(b"people", b"elpoep"))
        os.utime(mine.corpus, ns=(at.st_atime_ns, at.st_mtime_ns))  # by its content alone it is another one
        assert_one_error(call(*command), 2, "another corpus")
    assert numbers(up.Scores(tmp_path / "out")) == before


@pytest.mark.parametrize("what", ["weights", "corpus"])
@pytest.mark.parametrize("at", ["layers", "contraction"])
def test_inputs_that_are_overwritten_during_a_fit_and_a_trace_change_nothing(mine, tmp_path, what, at):
    new = other_weights(tmp_path / "other") if what == "weights" else b'{"text": "nothing of what it was"}\n'
    file = mine.model / "model.safetensors" if what == "weights" else mine.corpus

    def run(name: str, say) -> list[str]:
        model = up.load_model(mine.model, device="cpu")
        data = up.Corpus.read(mine.corpus, model.tokenizer, seq_len=16, cache=tmp_path / "cache")
        factors = up.fit(model, data, tmp_path / f"{name}-factors", say=say)
        queries = up.Queries.read(mine.queries)
        return numbers(up.trace(model, data, queries, factors, tmp_path / name, top=2, say=say))

    def spoiling(line: str) -> None:
        if line.startswith(at):
            overwrite(file, new)

    assert run("plain", lambda line: None) == run("spoiled", spoiling)
    assert file.read_bytes() == new


# ---- a corpus that changes while it is read

MANY = [{"id": n, "text": f"the people of the united states, {n} " * 40} for n in range(1200)]


def test_a_corpus_that_changes_while_it_is_read_is_refused_even_if_it_changes_back(tmp_path):
    file, tokenizer = write_jsonl(tmp_path / "c.jsonl", MANY), byte_tokenizer()
    sound = file.read_bytes()
    seen = []

    def changing(done: int, total: int) -> None:
        seen.append(done)
        overwrite(file, sound if done == total else sound.replace(b"people", b"elpoep"))

    with pytest.raises(CorpusError, match=r"changed while it was read: got .*c\.jsonl; give the same command again"):
        up.Corpus.read(file, tokenizer, seq_len=64, cache=tmp_path / "cache", progress=changing)
    assert (len(seen) > 1, file.read_bytes() == sound) == (True, True)
    read = up.Corpus.read(file, tokenizer, seq_len=64, cache=tmp_path / "cache")
    assert not read.reused
    assert {read.document_text(n).count("people") for n in range(read.n_documents)} == {40}


def test_a_parquet_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    file = tmp_path / "c.parquet"
    pd.DataFrame(RECORDS[:2]).to_parquet(file)
    with pytest.raises(CorpusError, match="changed while it was read"):
        up.Corpus.read(
            file,
            byte_tokenizer(),
            cache=tmp_path / "cache",
            progress=lambda *_: pd.DataFrame(RECORDS[:1]).to_parquet(file),
        )
    assert up.Corpus.read(file, byte_tokenizer(), cache=tmp_path / "cache").n_documents == 1


# ---- what is ours and what is not


FOREIGN = [
    "notes.txt",
    "eigen/notes.txt",
    "deep/er/notes.json",
    "correction/mine.safetensors",
    "queries.json",
    "in/key.json",
]


def test_overwrite_refuses_and_keeps_what_we_did_not_write(tiny, tmp_path, call):
    out = tmp_path / "out"
    assert call(*fit(tiny, out)).status == 0
    for place, content in product(FOREIGN, ("{}", "[1]")):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text(content)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        ran = call(*fit(tiny, out, "--seed", 1, "--overwrite"))
        assert_one_error(ran, 2, str(out / place), "did not write", "move it away")
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        (out / place).rename(tmp_path / "notes")
    assert call(*fit(tiny, out, "--seed", 1, "--overwrite")).status == 0
    assert sorted(p.name for p in out.iterdir()) == [".lock", "correction", "eigen", "key.json", "manifest.json"]


def test_overwrite_replaces_a_report_with_the_scores_it_shows(tiny, tmp_path, call):
    out = tmp_path / "out"
    assert call(*trace(tiny, out)).status == 0
    assert call("report", out).status == 0
    assert call(*trace(tiny, out, "--damping", "0.5x", "--overwrite")).status == 0
    assert not (out / "report.html").exists()
    (out / "report.html").write_text("a page of mine")
    assert_one_error(call(*trace(tiny, out, "--overwrite")), 2, str(out / "report.html"), "did not write")


@pytest.mark.parametrize("verb", [fit, trace])
def test_output_inside_another_artifact_is_refused(verb, tiny, tmp_path, call):
    scores = tmp_path / "scores"
    assert call(*trace(tiny, scores)).status == 0
    corpus = next(p for p in (tmp_path / "cache" / "corpus").iterdir() if p.is_dir())
    for folder in (tiny.factors, scores, tiny.factors / "eigen", corpus):
        ran = call(*verb(tiny, folder / "new" / "out"))
        assert_one_error(ran, 2, "inside another artifact", str(folder), "choose a folder outside of it")
        assert not (folder / "new").exists()
    with pytest.raises(ConfigError, match="inside another artifact"), locked(scores / "new"):
        pass


def test_a_plan_replaces_nothing_but_a_plan(tiny, tmp_path, call):
    place = tmp_path / "plan.json"
    for content in ("", "mine", "[1]", '{"machine": "mine"}', '{"fit": {"tokens": 1}}'):
        place.write_text(content)
        assert_one_error(call("plan", tiny.model, "100x16", "--out", place), 2, "--out", str(place), "is no plan")
        assert place.read_text() == content
    place.unlink()
    for size in ("100x16", "200x16"):
        assert call("plan", tiny.model, size, "--out", place).status == 0
    assert "passes" in json.loads(place.read_text())


def test_a_plan_does_not_replace_a_folder_or_a_head(tiny, call):
    for place in (tiny.factors, tiny.factors / "manifest.json"):
        assert_one_error(call("plan", tiny.model, "100x16", "--out", place), 2, str(place), "choose")
    assert call("report", tiny.factors).status == 2
    up.Factors(tiny.factors)


def test_temporary_files_of_living_processes_and_other_artifacts_are_left_alone(tmp_path):
    key = {"stage": "fit", "schema": SCHEMA}
    for folder in (tmp_path, tmp_path / "of-another"):
        folder.mkdir(exist_ok=True)
        write_json(folder / "key.json", key)
    (tmp_path / "of-another" / ".lock").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        ended = 2**22 + 1
        kept = [f".report.json.{living.pid}.tmp", f"of-another/.lam.safetensors.{ended}.tmp", f".draft.txt.{ended}.tmp"]
        gone = [f".lam.safetensors.{ended}.tmp", f".manifest.json.{os.getpid()}.tmp"]
        for name in kept + gone:
            (tmp_path / name).write_text("half")
        with locked(tmp_path):
            pass
        assert [name for name in kept + gone if (tmp_path / name).exists()] == kept
        living.communicate(b"\n")


# ---- what cannot be used


@pytest.mark.parametrize(("schema", "age"), [(1, "an older"), (SCHEMA + 1, "a newer")])
def test_artifacts_of_another_version_are_told_so_and_may_be_replaced(schema, age, tiny, tmp_path, call):
    out = tmp_path / "out"
    assert call(*fit(tiny, out)).status == 0
    for name in ("key.json", "manifest.json"):
        value = read_json(out / name)
        value.get("key", value)["schema"] = schema
        write_json(out / name, value)
    sentence = f"{out} was written by {age} version of this program: got schema {schema}, this one reads {SCHEMA}"
    with pytest.raises(InputError, match=sentence):
        up.Factors(out)
    assert_one_error(call(*fit(tiny, out)), 2, f"another schema: got {SCHEMA} now, {schema} then", "--overwrite")
    assert call(*fit(tiny, out, "--overwrite")).status == 0
    up.Factors(out)


def test_a_manifest_that_is_not_as_we_write_it_is_refused_with_the_entry(tiny, tmp_path):
    out = Path(shutil.copytree(tiny.factors, tmp_path / "out"))
    manifest = read_json(out / "manifest.json")
    manifest["layers"][1]["shape"] = "wide"
    write_json(out / "manifest.json", manifest)
    with pytest.raises(
        StorageError, match=r"manifest\.json: its entry 'layers\.1\.shape' is not as this version writes it"
    ):
        up.Factors(out)


def test_a_checksum_knows_the_place_and_the_key(tmp_path):
    stages = [Artifact.open(tmp_path / str(n), "stage", {"n": n}) for n in range(2)]
    for stage in stages:
        for unit in range(2):
            stage.commit(unit, {"x": torch.full((4,), float(unit))})
    assert torch.equal(stages[0].read(1)["x"], torch.ones(4))
    held = stages[0].unit_path(0).read_bytes()
    for place in (stages[0].unit_path(1), stages[1].unit_path(0)):
        place.write_bytes(held)
        with pytest.raises(
            StorageError, match=f"cannot read {place}: its checksum is not that of its content; *|damaged"
        ):
            check(place)
    assert torch.equal(stages[0].read(0)["x"], torch.zeros(4))


def test_a_checksum_covers_every_byte(tmp_path):
    stage = Artifact.open(tmp_path, "stage", {})
    file = stage.unit_path(0)
    write_tensors(file, {"x": torch.arange(3.0), "y": torch.ones(2, dtype=torch.int64)})
    sound = file.read_bytes()
    for at in range(len(sound)):
        held = bytearray(sound)
        held[at] ^= 1 << at % 8
        file.write_bytes(held)
        with pytest.raises(StorageError):
            stage.read(0)
    file.write_bytes(sound)
    assert stage.read(0).keys() == {"x", "y"}


def test_damaged_finished_scores_are_not_used_as_they_are(tiny, tmp_path, call):
    out = tmp_path / "out"
    assert call(*trace(tiny, out)).status == 0
    held = bytearray((out / "scores.parquet").read_bytes())
    held[len(held) // 2] ^= 1
    (out / "scores.parquet").write_bytes(held)
    assert_one_error(call(*trace(tiny, out)), 1, "scores.parquet", "checksum", "give the same command again")
    assert_one_error(call("report", out), 2, "scores.parquet", "checksum", "upriver trace")
    assert call(*trace(tiny, out, "--overwrite")).status == 0
    assert call("report", out).status == 0
