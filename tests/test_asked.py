"""Queries in every shape, sets of them as one question, and directions: against the templates and against autograd."""

import csv
import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import cli_cases
import upriver as up
from cli_cases import tiny_llama
from test_chat import CALL, CHATML, ENDLESS, FAMILIES, LLAMA, TALK, THOUGHTS, TOOL, tokenizer
from text_cases import byte_tokenizer, write_jsonl
from upriver.curvature.blocks import BlockCurvature
from upriver.errors import QueryError
from upriver.influence.queries import measurements, token_gradients
from upriver.model.generate import complete
from upriver.model.layers import find_layers
from upriver.model.model import Model
from upriver.show.report import write_report
from upriver.text.queries import Queries
from upriver.text.watch import bounded

BYTE = byte_tokenizer()
PLAIN = {"id": "a", "prompt": "we the", "completion": " people"}
OTHER = {"id": "b", "prompt": "it is the end of the", "completion": " war", "contrast": " union"}


def parts(queries: Queries, i: int = 0) -> list[tuple[str, str]]:
    query = queries.records[i]
    return [(query.prompt, text) for text in (query.completion, *query.contrasts)]


# ---- chats


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_turn_of_a_chat_is_the_answer_and_the_rest_its_prompt(family):
    template, turns = FAMILIES[family]
    made = tokenizer(template)
    queries = Queries.of([{"messages": TALK}], made)
    ((prompt, answer),) = parts(queries)
    assert answer.strip() == turns[-1].strip()
    assert made.apply_chat_template(TALK, tokenize=False).startswith(prompt + answer)
    assert "and yes or no" in prompt
    assert "".join(queries.pieces(queries.rows_of_query[0][0])).strip() == turns[-1].strip()
    text = made(prompt + answer, add_special_tokens=False)["input_ids"]
    assert queries.batch([0]).inputs["tokens"][0].tolist() == text, "a template brings its own special tokens"


def test_earlier_turns_that_the_template_rewrites_do_not_matter():
    thoughtful = [TALK[0], {"role": "assistant", "content": "<think>well</think>yes"}, *TALK[2:]]
    ((prompt, answer),) = parts(Queries.of([{"messages": thoughtful}], tokenizer(THOUGHTS)))
    assert "well" not in prompt
    assert prompt.endswith("<assistant>")
    assert answer == "no<eot>"


def test_tools_go_to_the_template_and_a_call_is_an_answer():
    ((prompt, answer),) = parts(Queries.of([{"messages": [TALK[0], CALL], "tools": [TOOL]}], tokenizer(CHATML)))
    assert '"look"' in prompt
    assert answer == "<call>look</call><|im_end|>"


def test_conversational_prompts_completions_and_contrasts():
    """As TRL has them, as texts, and as texts behind the generation prompt: one and the same prompt."""
    say = [{"role": "assistant", "content": "no"}]
    asked = [
        {"prompt": TALK[:3], "completion": say, "contrast": [{"role": "assistant", "content": "yes"}]},
        {"messages": TALK, "contrast": "yes"},
        {"messages": TALK, "contrast": ["yes", say]},
        {"messages": TALK[:3], "completion": "no", "contrast": "yes"},
        {"messages": json.dumps(TALK)},
    ]
    queries = Queries.of(asked, tokenizer(LLAMA))
    assert len({query.prompt for query in queries.records}) == 1
    answers = [[text for _, text in parts(queries, i)] for i in range(len(asked))]
    both = ["no<|eot|>", "yes<|eot|>"]
    assert answers == [both, both, [*both, "no<|eot|>"], ["no", "yes"], ["no<|eot|>"]]


def test_a_chat_without_an_answer_is_completed_by_the_model():
    model = Model(tiny_llama(vocab_size=300, max_position_embeddings=128), tokenizer(LLAMA))
    open_ended = Queries.of([{"id": "open", "messages": TALK[:3]}], model.tokenizer, complete=3)
    assert open_ended.needs_completion == [0]
    done = complete(model, open_ended, 3)
    record = done.records[0]
    assert record.generated
    again = Queries.of([record.again()], model.tokenizer)
    assert again.fingerprint == done.fingerprint
    tokens = torch.tensor([model.tokenizer(record.prompt, add_special_tokens=False)["input_ids"]])
    likeliest = model.tokenizer.decode(model.module(tokens).logits[0, -1].argmax())
    assert record.completion.startswith(likeliest)


BAD_CHATS = {
    "has messages and a prompt": {"messages": TALK, "prompt": "we"},
    "has two answers": {"messages": TALK, "completion": "no"},
    "has no message before the answer": {"messages": [TALK[1]]},
    "is one message of the assistant: got ['user']": {"prompt": TALK[:1], "completion": TALK[:1]},
    "contrast of query 'q1' is a message and its completion is none": {
        "messages": TALK[:1], "completion": "x", "contrast": [TALK[1]],
    },
    "the field 'messages' is not a list of objects: got 'hello'": {"messages": "hello"},
    "a message has no text as its 'content'": {"messages": [{"role": "user", "content": [1]}]},
    "the field 'tools' is not a list of objects": {"messages": TALK, "tools": "look"},
    "the chat template refuses the messages": {"messages": [{"role": "user", "content": "REFUSE"}, TALK[1]]},
    "has tools and no messages": PLAIN | {"tools": [TOOL]},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CHATS)
def test_chats_that_cannot_be_asked_about(message):
    from text_cases import chat_tokenizer

    with pytest.raises(QueryError) as error:
        Queries.of([BAD_CHATS[message]], chat_tokenizer())
    assert message in str(error.value)
    assert str(error.value).startswith("query 1: ")


def test_a_chat_needs_a_template():
    with pytest.raises(QueryError, match="has no chat template to render it; give prompt and completion"):
        Queries.of([{"messages": TALK}], BYTE)


def test_a_template_that_loops_for_ever_is_stopped_before_an_answer_too(monkeypatch):
    made = tokenizer(ENDLESS)
    monkeypatch.setattr("upriver.text.chat.bounded", lambda: bounded(0.2))
    with pytest.raises(QueryError, match=r"query 1: the chat template did not end within .* mend the loop in it"):
        Queries.of([{"messages": TALK[:1]}], made, complete=4)


# ---- files, labels, contrasts


def test_json_csv_and_parquet_hold_what_json_lines_hold(tmp_path):
    rows = [PLAIN | {"kind": "x"}, OTHER | {"kind": ""}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([(x, pa.string()) for x in rows[1]])), tmp_path / "q.parquet")
    with open(tmp_path / "q.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[1])
        table.writeheader()
        table.writerows(rows)
    read = {kind: Queries.read(tmp_path / f"q.{kind}", BYTE) for kind in ("jsonl", "json", "parquet", "csv")}
    assert {kind: parts(q, 1) for kind, q in read.items()} == dict.fromkeys(read, parts(read["jsonl"], 1))
    assert {kind: q.records[0].contrasts for kind, q in read.items()} == dict.fromkeys(read, ())
    assert read["json"].fingerprint == read["parquet"].fingerprint == read["jsonl"].fingerprint
    assert read["csv"].records[0].labels == {"kind": "x"}


def test_further_fields_are_labels_and_a_near_miss_is_refused():
    queries = Queries.of([PLAIN | {"kind": "x", "context": 1, "idx": float("nan"), "content": [2]}], BYTE)
    assert queries.records[0].labels == {"kind": "x", "context": 1, "idx": None, "content": [2]}
    for name, meant in {"complation": "completion", "Contrast": "contrast", "groups": "group", "ID": "id"}.items():
        with pytest.raises(QueryError, match=f"no such field: got '{name}'; did you mean '{meant}'"):
            Queries.of([PLAIN | {name: "x"}], BYTE)


def test_of_several_contrasts_the_mean_is_subtracted():
    several = OTHER | {"contrast": [" union", " end", " people"]}
    model = Model(tiny_llama(), BYTE)
    alone = [
        OTHER | {"id": str(n), "completion": x, "contrast": None} for n, x in enumerate([" war", *several["contrast"]])
    ]
    f, each = measurements(model, Queries.of([several], BYTE))[0], measurements(model, Queries.of(alone, BYTE))
    assert f == pytest.approx(each[0] - each[1:].mean(), rel=1e-5)
    for empty in ([], [""], [" a", ""]):
        with pytest.raises(QueryError, match="the contrast of query 'b' is empty"):
            Queries.of([OTHER | {"contrast": empty}], BYTE)


# ---- sets


SET = [PLAIN | {"group": "both", "kind": "x"}, OTHER | {"group": "both"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return cli_cases.build_fitted(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def traced(tiny):
    """Both members alone, the set of the two, a direction and a set of directions, in one trace."""
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16)
    np.save(tiny.root / "probe.npy", np.linspace(-1, 2, 32).astype(np.float32))
    probe = {"direction": str(tiny.root / "probe.npy"), "layer": 1}
    asked = [
        PLAIN, OTHER, *({**x, "id": f"{x['id']} again"} for x in SET),
        {"id": "probe", "prompt": "we the people", **probe}, {"id": "last", "prompt": "the war", **probe, "layer": 2},
        {"id": "m1", "group": "probes", "prompt": "we the people", **probe},
        {"id": "m2", "group": "probes", "prompt": "the union", **probe},
        {"id": "other", "prompt": "the union", **probe},
    ]  # fmt: skip
    queries = Queries.of(asked, model.tokenizer)
    factors = up.Factors(tiny.factors)
    out = tiny.root / "scores"
    result = up.trace(model, corpus, queries, factors, out, rank="full", top=3, held_out=0, unit_norm=True)
    return model, corpus, queries, result


def test_a_set_has_the_mean_of_the_scores_of_its_members_and_is_one_column(traced):
    _, _, queries, result = traced
    frame = result.frame()
    assert queries.ids == ["a", "b", "both", "probe", "last", "probes", "other"]
    assert "a again" not in frame
    for name, members in {"both": ["a", "b"], "probes": ["probe", "other"]}.items():
        mean = frame[members].mean(axis=1)
        np.testing.assert_allclose(frame[name], mean, rtol=1e-5, atol=1e-5 * mean.abs().max())
    told = {x["id"]: x for x in result.queries}
    assert [x["id"] for x in told["both"]["members"]] == ["a again", "b again"]
    assert told["both"]["members"][0]["labels"] == {"kind": "x"}
    assert told["both"]["log_prob"] == pytest.approx((told["a"]["log_prob"] + told["b"]["log_prob"]) / 2)
    assert told["both"]["measurement"] == pytest.approx(told["both"]["log_prob"], rel=1e-5)
    assert set(result.top("both", 3)["query"]) == {"both"}


def test_the_questions_of_a_trace_are_read_again_to_verify_it(traced):
    _, _, queries, result = traced
    told = json.loads((result.path / "queries.json").read_text())
    told = told if isinstance(told, list) else told["value"]
    asked = [record for x in told for record in x["asked"]]
    assert Queries.of(asked, queries.tokenizer).fingerprint == queries.fingerprint
    found = up.verify(result.path, how="finetune", top=1, random=0)
    assert [x["id"] for x in found["queries"]] == queries.ids
    assert found["shown"]["pearson"] == pytest.approx(1, abs=0.02)


def test_the_report_and_the_terminal_show_the_members_of_a_set(traced, capsys):
    from rich.console import Console

    from upriver.show.terminal import terminal_summary

    *_, result = traced
    page = write_report(result.path)
    report = json.loads(page.with_suffix(".json").read_text())
    both = next(q for q in report["queries"] if q["id"] == "both")
    assert [x["completion"] for x in both["members"]] == [" people", " war"]
    assert both["members"][0]["labels"] == {"kind": "x"}
    terminal_summary(result.path, Console(width=200))
    said = capsys.readouterr().out
    assert "mean over 2 questions" in said
    assert "we the people" in said


def test_a_set_larger_than_a_batch_goes_through_in_pieces():
    model = Model(tiny_llama(), BYTE)
    layers = find_layers(model.module, "mlp")
    words = ["we", "the", "people", "of", "the", "united", "states"]
    asked = [
        {"prompt": " ".join(words[: 1 + n % 6]), "completion": " " + words[n % 7], "group": "all"} for n in range(60)
    ]
    rows = []
    model.module.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    (whole,), one = ([Queries.of(asked, BYTE)], Queries.of([{**x, "group": None} for x in asked], BYTE))
    found = token_gradients(model, layers, whole, [0], batch_tokens=64)
    assert max(rows) <= 64 < int(whole.lengths[0])
    alone = token_gradients(model, layers, one, list(range(60)))
    for x in layers:
        (q,) = found.pop(x, [0], model.like)
        assert len(q.a_MI) <= min(x.O, x.I), "what is kept does not grow with the members"
        mean = torch.stack([y.dense() for y in alone.pop(x, list(range(60)), model.like)]).mean(0)
        torch.testing.assert_close(q.dense(), mean, rtol=1e-4, atol=1e-6)


BAD_SETS = {
    "a query and a group have one name: got 'a'": [PLAIN, OTHER | {"group": "a"}],
    "two queries have one id": [PLAIN, PLAIN | {"group": "a"}],
    "the group 'start' is the name of a column": [PLAIN | {"group": "start"}],
    "a query needs a name as its group: got 1.5": [PLAIN | {"group": 1.5}],
    "the members of a group measure different things": [
        PLAIN | {"group": "g"}, {"id": "d", "prompt": "we", "direction": [1.0], "layer": 1, "group": "g"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_SETS)
def test_sets_that_are_none(message):
    with pytest.raises(QueryError) as error:
        Queries.of(BAD_SETS[message], BYTE)
    assert message in str(error.value)


def test_a_file_as_one_question(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{k: v for k, v in x.items() if k != "id"} for x in (PLAIN, OTHER)])
    queries = Queries.read(path, BYTE, as_set="all of it")
    assert queries.ids == ["all of it"]
    assert [x.id for x in queries.records] == ["all of it/1", "all of it/2"]


# ---- directions


def test_the_scores_of_a_direction_are_those_of_autograd(traced):
    """The gradient of the mean projection, times the inverse in the eigenbasis, times the gradient of each sequence's loss."""
    model, corpus, queries, result = traced
    layers = up.tracked_layers(model, corpus, "mlp")
    frame = result.frame()
    curvature = up.Factors(result.path.parent / "factors").curvature()
    assert isinstance(curvature, BlockCurvature)
    d_H = torch.linspace(-1, 2, 32)
    for name, layer in {"probe": 1, "last": 2}.items():
        query = next(x for x in queries.records if x.id == name)
        tokens = torch.tensor([model.tokenizer(query.prompt)["input_ids"]])
        weights = [m.weight.requires_grad_() for x in layers for m in x.modules]
        states = model.module(input_ids=tokens, output_hidden_states=True).hidden_states[layer][0]
        f = (states @ d_H).mean()
        told = next(x for x in result.queries if x["id"] == name)
        assert told["measurement"] == pytest.approx(float(f.detach()), rel=1e-4)
        assert told["log_prob"] is None
        q = torch.autograd.grad(f, weights, allow_unused=True)
        q = {x.name: torch.zeros(1, x.O, x.I) if g is None else g[None] for x, g in zip(layers, q, strict=True)}
        v = curvature.solve(q, up.Damping()).value
        expected = []
        for row in range(len(corpus)):
            loss = model.task.loss(model.module, corpus.batch(np.array([row])))
            g = torch.autograd.grad(loss, weights)
            expected.append(-sum(float((v[x.name][0] * g).sum()) for x, g in zip(layers, g, strict=True)))
        for w in weights:
            w.requires_grad_(False)
        np.testing.assert_allclose(frame[name], expected, rtol=1e-3, atol=1e-4 * max(map(abs, expected)))


def test_a_first_token_that_is_no_start_token_counts_as_text():
    queries = Queries.of([{"prompt": "we the", "direction": np.ones(32), "layer": 1}], BYTE)
    with_start = Queries.of([{"prompt": "we the", "direction": [1.0] * 32, "layer": 1}], byte_tokenizer(bos=True))
    model = Model(tiny_llama(), BYTE)
    for asked, skipped in ((queries, 0), (with_start, 1)):
        tokens = asked.batch([0]).inputs["tokens"]
        states = model.module(input_ids=tokens, output_hidden_states=True).hidden_states[1][0, skipped:]
        assert measurements(model, asked)[0] == pytest.approx(float(states.sum(1).mean().detach()), rel=1e-5)


def test_directions_that_cannot_be_measured(tmp_path):
    np.save(tmp_path / "wide.npy", np.ones(7))
    np.save(tmp_path / "flat.npy", np.ones((2, 3)))
    np.save(tmp_path / "none.npy", np.zeros(32))
    (tmp_path / "text.npy").write_text("no")
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    good = {"id": "d", "prompt": "we the", "direction": "wide.npy", "layer": 1}
    said = {
        "has no layer": {"layer": None}, "a whole number from 1: got 0": {"layer": 0}, "got True": {"layer": True},
        "has no prompt": {"prompt": None}, "measured on the prompt alone: got completion": {"completion": "x"},
        "missing.npy (no such file)": {"direction": "missing.npy"}, "text.npy": {"direction": "text.npy"},
        "pickle.npy": {"direction": "pickle.npy"}, "shape [2, 3]": {"direction": "flat.npy"},
        "not all zero": {"direction": "none.npy"},
    }  # fmt: skip
    for message, change in said.items():
        path = write_jsonl(tmp_path / "q.jsonl", [{k: v for k, v in (good | change).items() if v is not None}])
        with pytest.raises(QueryError) as error:
            Queries.read(path, BYTE)
        assert message in str(error.value)
    queries = Queries.read(write_jsonl(tmp_path / "q.jsonl", [good]), BYTE)
    model = Model(tiny_llama(), BYTE)
    with pytest.raises(up.UpriverError, match=r"wide\.npy.*got 7 numbers.* of 32 numbers"):
        up.trace(model, case_corpus(tmp_path), queries, None, tmp_path / "out", curvature="identity")


def case_corpus(folder):
    path = write_jsonl(folder / "corpus.jsonl", [{"text": "we the people"}])
    return up.Corpus.read(path, BYTE, seq_len=16)


def test_numbers_of_a_table_are_finite(traced):
    *_, result = traced
    top = pd.read_parquet(result.path / "top.parquet")
    assert np.isfinite(top["score"]).all()
    assert math.isfinite(result.frame()["probes@unit"].abs().max())
