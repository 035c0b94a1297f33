"""Failed samples of an evaluation become questions: logs that inspect and the evaluation harness wrote, damaged and foreign ones.

``tests/make_evaluation_fixtures.py`` wrote them.
"""

import gzip
import json
import shutil
import zipfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

import upriver as up
from test_chat import LLAMA, tokenizer
from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import ConfigError, QueryError
from upriver.text.queries import Queries

LOGS = Path(__file__).parent / "fixtures" / "evaluations"
CHOICE, NUMBER = (LOGS / f"samples_{name}_2026-11-01T10-00-00.000000.jsonl" for name in ("choice", "number"))
CHAT = tokenizer(LLAMA)


def asked(path: Path, made=None, **how) -> dict[str, list[str]]:
    queries = Queries.read(path, made or CHAT, **how)
    return {x.id: [str(x.completion), *x.contrasts] for x in queries.records}


@pytest.mark.parametrize("form", ["json", "eval"])
def test_failed_samples_of_inspect_are_asked_about(form):
    """As the model was given them, its answer against the targets; the .eval form is a zip that zipfile cannot unpack."""
    path = LOGS / f"capitals.{form}"
    if form == "eval":
        assert {x.compress_type for x in zipfile.ZipFile(path).infolist()} == {93}
    expected = {
        "capitals/japan": ["well, it is kyoto<|eot|>", "tokyo<|eot|>", "edo<|eot|>"],
        "capitals/peru": ["it is cusco<|eot|>", "lima<|eot|>"],
    }
    assert asked(path) == expected
    assert asked(path, samples="passed") == {"capitals/france": ["i think that it is paris<|eot|>"]}
    assert list(asked(path, samples="all")) == ["capitals/france", *expected]
    query = Queries.read(path, CHAT).records[1]
    assert query.prompt == "[system]\n\nbe brief<|eot|>[user]\n\nwhat is the capital of peru?<|eot|>[assistant]\n\n"
    assert query.labels == {"task": "capitals", "sample": "peru", "score": "match", "value": "I"}
    (passed,) = Queries.read(path, samples="passed").records
    assert passed.labels["metadata"] == {"topic": "west"}


def test_the_target_stands_where_the_scorer_found_the_answer():
    assert asked(LOGS / "letters.eval") == {"letters/1": ["ANSWER: A<|eot|>", "ANSWER: B<|eot|>"]}
    assert "B) rhine" in Queries.read(LOGS / "letters.eval", CHAT).records[0].prompt, "as the solver wrote the question"


def test_failed_samples_of_the_harness_are_asked_about():
    plain = byte_tokenizer()
    assert asked(CHOICE, plain) == {"choice/0": [" mill", " old town"]}
    assert Queries.read(CHOICE, plain).records[0].prompt == "the river runs past the"
    assert asked(CHOICE, plain, samples="failed:acc_norm") == {"choice/1": [" old river", " town"]}
    assert asked(CHOICE, plain, samples="passed") == {"choice/1": [" town"]}
    assert asked(NUMBER, plain) == {"number/0": [" it is 41\nor so", " it is 42\nor so"]}, "of the first filter"


def folder(root: Path, **files: Path) -> Path:
    """Logs under the names given, in which two underscores stand for a point and three for a folder."""
    for name, log in files.items():
        place = root / name.replace("___", "/").replace("__", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, place)
    return root


def test_a_folder_of_logs_is_read_in_the_order_of_names(tmp_path):
    """With what the programs write beside their logs; a task of which there is one log names its questions."""
    logs = folder(tmp_path, b__eval=LOGS / "letters.eval", a___c__json=LOGS / "capitals.json")
    (logs / "logs.json").write_text("{}")
    (logs / "results_2026-11-01T10-00-00.000000.json").write_text('{"results": {}}')
    assert list(asked(logs)) == ["capitals/japan", "capitals/peru", "letters/1"]
    queries = Queries.read(logs, CHAT)
    assert queries.records[2].where == f"{logs / 'b.eval'}: samples/1_epoch_1.json"
    assert list(asked(logs, samples="passed")) == ["capitals/france", "letters/2"]
    passed = changed("sample", scores={"match": {"value": 1}})
    (logs / "a" / "c.json").write_text(json.dumps(passed))
    assert list(asked(logs)) == ["letters/1"], "of one of the logs no sample failed"


def test_logs_of_one_task_are_told_apart_by_their_files(tmp_path):
    logs = folder(
        tmp_path, x___1__eval=LOGS / "capitals.eval", x___2__json=LOGS / "capitals.json", y__eval=LOGS / "letters.eval"
    )
    expected = [f"x/{file}/{name}" for file in ("1.eval", "2.json") for name in ("japan", "peru")]
    assert list(asked(logs)) == [*expected, "letters/1"]
    assert {x.labels["task"] for x in Queries.read(logs, CHAT).records} == {"capitals", "letters"}


@pytest.mark.parametrize("end", ["", "__gz", "__zst"])
def test_a_folder_of_samples_of_the_harness_compressed_or_not(tmp_path, end):
    logs = folder(tmp_path, **{f"samples_{x.name.split('_')[1]}__jsonl": x for x in (NUMBER, CHOICE)})
    for path in list(logs.iterdir()) if end else ():
        pack = gzip.compress if end == "__gz" else partial(pa.compress, codec="zstd", asbytes=True)
        path.with_name(path.name + end.replace("__", ".")).write_bytes(pack(path.read_bytes()))
        path.unlink()
    assert asked(logs, byte_tokenizer()) == asked(CHOICE, byte_tokenizer()) | asked(NUMBER, byte_tokenizer())


def test_a_log_of_inspect_may_be_compressed(tmp_path):
    path = tmp_path / "capitals.json.gz"
    path.write_bytes(gzip.compress((LOGS / "capitals.json").read_bytes()))
    assert asked(path) == asked(LOGS / "capitals.json")


def test_what_is_no_log_among_logs_is_refused_by_name(tmp_path):
    logs = folder(tmp_path, a__eval=LOGS / "letters.eval")
    for name, content in {
        "notes.txt": "hello",
        "q.jsonl": '{"id": "1"}\n',
        "odd.bin2": "",
        "cut.json": '{"eval":',
    }.items():
        (logs / name).write_text(content)
        with pytest.raises(QueryError, match="a folder of logs of evaluations holds another file") as error:
            Queries.read(logs)
        assert str(logs / name) in str(error.value)
        (logs / name).unlink()
    (logs / "z.eval").write_text("hello")
    with pytest.raises(QueryError, match=r"z\.eval: the log cannot be read"):
        Queries.read(logs)
    (logs / "z.eval").unlink()
    (logs / "a.eval").rename(logs / "a.jsonl")
    with pytest.raises(ConfigError, match="leave out --samples"):
        Queries.read(logs, samples="all")


def test_all_failures_as_one_question():
    queries = Queries.read(LOGS / "capitals.eval", CHAT, as_set="failures")
    assert queries.ids == ["failures"]
    assert [x.id for x in queries.records] == ["capitals/japan", "capitals/peru"]
    assert queries.batch([0]).weight_N.tolist() == [0.5, -0.25, -0.25, 0.5, -0.5]


def test_an_audit_asks_for_the_right_answers():
    assert asked(LOGS / "letters.eval", right=True) == {"letters/1": ["ANSWER: B<|eot|>", "ANSWER: A<|eot|>"]}
    assert asked(CHOICE, byte_tokenizer(), right=True) == {"choice/0": [" old town", " mill"]}


def test_a_start_token_in_the_text_of_a_request_is_not_doubled(tmp_path):
    made = byte_tokenizer(bos=True)
    rows = [json.loads(line) for line in CHOICE.read_text().splitlines()]
    for row in rows:
        for request in row["arguments"].values():
            request["arg_0"] = "<bos>" + request["arg_0"]
    path = write_jsonl(tmp_path / CHOICE.name, rows)
    with_text, without = (Queries.read(file, made) for file in (path, CHOICE))
    assert with_text.batch([0]).inputs["tokens"].tolist() == without.batch([0]).inputs["tokens"].tolist()


def changed(name: str, **change) -> dict:
    log = json.loads((LOGS / "capitals.json").read_text())
    sample = log["samples"][2]
    if name == "log":
        return log | change
    log["samples"] = [sample | change]
    return log


def test_what_is_set_apart_is_put_back_and_parts_of_messages_are_joined(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "attachment://x"}, {"type": "image", "image": "y"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "it is cusco"}],
         "tool_calls": None},
    ]  # fmt: skip
    path = tmp_path / "log.json"
    path.write_text(json.dumps(changed("sample", messages=messages, attachments={"x": "of peru?"}, epoch=2)))
    (query,) = Queries.read(path, CHAT).records
    assert query.id == "capitals/peru#2"
    assert query.prompt == "[user]\n\nof peru?<|eot|>[assistant]\n\n"
    assert query.completion == "it is cusco<|eot|>"
    assert query.given["completion"][0]["reasoning_content"] == "hm"


def test_a_sample_whose_conversation_was_not_kept_is_read_from_its_input(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(changed("sample", messages=[])))
    (query,) = Queries.read(path, CHAT).records
    assert query.prompt == "[user]\n\nwhat is the capital of peru?<|eot|>[assistant]\n\n"
    assert query.completion == "it is cusco<|eot|>"


REFUSED = {
    "of an unknown version: got 3; versions 1, 2": changed("log", version=3),
    "its samples are no list": changed("log", samples={"a": 1}),
    "got 0 failed, 0 passed, 0 neither by its score": changed("log", samples=[]),
    "no such score: got 'no score'; it has none": changed("sample", scores={}),
    "it has no id or no input": changed("log", samples=[{"id": 1}]),
    "not a sample as inspect writes them": changed("sample", messages=[{"role": "user"}]),
    "got 0 failed, 1 passed, 0 neither": changed("sample", scores={"match": {"value": 1}}),
    "0 failed, 0 passed, 1 neither": changed("sample", scores={"words": {"value": {"a": 1}}}),
    "left out: the model gave no answer": None,
}


@pytest.mark.parametrize("message", REFUSED)
def test_logs_that_hold_no_question(message, tmp_path):
    path = tmp_path / "log.json"
    if REFUSED[message] is None:  # of one of two samples nothing can be asked: it is told
        log = json.loads((LOGS / "capitals.json").read_text())
        log["samples"][2]["messages"][-1]["content"] = ""
        path.write_text(json.dumps(log))
        queries = Queries.read(path, CHAT)
        assert queries.ids == ["capitals/japan"]
        assert message in queries.notes[0]
        return
    path.write_text(json.dumps(REFUSED[message]))
    with pytest.raises(QueryError) as error:
        Queries.read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_damaged_and_foreign_files(tmp_path):
    whole = (LOGS / "capitals.eval").read_bytes()
    flipped = bytearray(whole)
    with zipfile.ZipFile(LOGS / "capitals.eval") as log:
        at = log.getinfo("samples/peru_epoch_1.json").header_offset
    flipped[at + 200] ^= 255
    with zipfile.ZipFile(tmp_path / "other.eval", "w") as other:
        other.writestr("hello.json", "{}")
    with zipfile.ZipFile(tmp_path / "broken.eval", "w") as broken:
        broken.writestr("header.json", "{")
    for name, content in {"cut.eval": whole[:-300], "flipped.eval": bytes(flipped), "text.eval": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
    said = {
        "cut.eval": "cannot be read", "flipped.eval": "cannot be read", "text.eval": "cannot be read",
        "other.eval": "holds no header.json", "broken.eval": "broken JSON",
    }  # fmt: skip
    for name, part in said.items():
        with pytest.raises(QueryError, match=part) as error:
            Queries.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    cut = json.loads(CHOICE.read_text().splitlines()[0])
    del cut["target"]
    with pytest.raises(QueryError, match="not a sample as the evaluation harness writes them"):
        Queries.read(write_jsonl(tmp_path / "samples_x.jsonl", [cut]))
    with pytest.raises(QueryError, match="no such score: got 'f1'; it has acc, acc_norm"):
        Queries.read(CHOICE, samples="failed:f1")
    with pytest.raises(ConfigError, match="bad value for --samples: got 'bad'"):
        Queries.read(CHOICE, samples="bad")
    with pytest.raises(ConfigError, match="leave out --samples"):
        Queries.read(write_jsonl(tmp_path / "q.jsonl", [{"id": 1, "completion": "a b"}]), samples="all")


def test_a_log_is_traced_from_the_command_line(tmp_path, capsys, monkeypatch):
    import cli_cases

    tiny = cli_cases.build(tmp_path)
    log = Path(shutil.copy(CHOICE, tmp_path))
    how = ("--curvature", "identity", "--seq-len", 16, "--top", 2)
    out = tmp_path / "scores"
    ran = cli_cases.upriver(
        capsys,
        monkeypatch,
        "trace",
        tiny.model,
        tiny.corpus,
        log,
        "--out",
        out,
        *how,
        "--samples",
        "all",
        "--as-set",
        "choices",
    )
    assert ran.status == 0, ran.err
    assert "mean over 2 questions" in ran.out
    (told,) = up.Scores(out).queries
    assert [x["labels"]["value"] for x in told["members"]] == [0.0, 1.0]
