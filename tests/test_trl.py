"""Of a chat the same tokens carry loss as where TRL's trainer learns from the assistant's turns alone, where TRL is installed.

TRL marks what the assistant generates in templates of its own (``assistant_only_loss``). Where it has marked a template, a corpus
follows the marks; where a template has none, the turns are found by rendering, and must be the ones that TRL has marked in it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from test_chat import TALK
from text_cases import byte_tokenizer, write_jsonl
from upriver.text.chat import renderings
from upriver.text.corpus import Corpus

utils = pytest.importorskip("trl.chat_template_utils")
TEMPLATES = Path(utils.__file__ or "").with_name("chat_templates")
FAMILIES = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3_instruct_2507": ["<|im_start|>", "<|im_end|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "cohere": ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|end|>"],
    "lfm2": ["<|im_start|>", "<|im_end|>"],
    "gptoss": ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
    "deepseekv3": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
}  # fmt: skip
HEADERS = {
    "gptoss": "<|start|>assistant",
    "deepseekv3": "<｜Assistant｜>",
}  # which TRL counts to the turn: they prompt it


def tokenizer(family: str) -> tuple[Any, str]:
    """With the template as models of the family have it, and the one that TRL trains with in its place."""
    made: Any = byte_tokenizer(bos=True)
    made.model_max_length = 10_000
    made.add_special_tokens({"additional_special_tokens": FAMILIES[family]})
    made.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    marked = utils.get_training_chat_template(made)
    assert marked
    return made, marked


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_are_followed_as_by_the_trainer(family, tmp_path):
    made, made.chat_template = tokenizer(family)
    theirs = made.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": TALK}])
    inputs = Corpus.read(path, made).batch(np.arange(1)).inputs
    assert inputs["tokens"][0].tolist() == theirs["input_ids"]
    assert inputs["loss"][0].int().tolist() == theirs["assistant_masks"]
    assert 1 in theirs["assistant_masks"]


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_template_without_marks_are_those_that_trl_marks(family):
    """But for the line break behind the token that ends a turn, which no model generates."""
    made, marked = tokenizer(family)
    ((text, spans),) = renderings(TALK, made)
    how: Any = {"chat_template": marked, "return_assistant_tokens_mask": True, **made.special_tokens_map}
    rendered: Any = render_jinja_template([TALK], **how)
    assert text == rendered[0][0]
    theirs = "".join(text[a:b] for a, b in rendered[1][0])
    ours = "".join(text[a:b] for a, b in spans)
    assert ours.replace("\n", "") == theirs.replace("\n", "").replace(HEADERS.get(family, "\n"), "")
