"""Tiny tokenizers for the tests of the text layer, and a writer of JSON lines."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = ["we the people of the united states", "the people of the union", "it is the end of the war"]
SPECIAL = ["<bos>", "<eos>"]
CHAT = """{% for m in messages %}{% if m.content == 'REFUSE' %}{{ raise_exception('no') }}{% endif %}\
<{{ m.role }}>{{ 'other' if m.content == 'REWRITE' else m.content.strip() }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def byte_tokenizer(bos=False, eos=False, trim=False):
    """A byte-level BPE of 290 tokens; ``trim`` leaves the space before a word out of the offsets, as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos or eos:
        single = " ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", model_max_length=16
    )


def fallback_tokenizer():
    """A BPE with a word-start mark and single bytes for unknown characters, as SentencePiece makes them."""
    words = [
        "<bos>",
        "<eos>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdehinoprstuwxyz日",
        "▁t",
        "▁th",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "t"), ("▁t", "h")], unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def chat_tokenizer():
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
