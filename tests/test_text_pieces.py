"""A long text that is tokenised in pieces has the tokens of the whole text, whatever the tokenizer is made of."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from text_cases import LINES, byte_tokenizer, fallback_tokenizer
from upriver.text.pieces import cutter
from upriver.text.tokenise import encode

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "we", "the", " People", "of", "'s", "don't", "I'LL", " 's", "12345", "  ", "\n\n", " \n ", "\t", "\r\n", ".", ", ", "...",
    "?!", "e.g.", "<bos>", "<x>", "日本。", "日本語", "état", "e\u0301", "ЖИзнь", "\U0001f642", "(a)", "http://a.b/c?d", "ﬁ",
    "한국어", "\xa0",
]  # fmt: skip


def drawn(count, seed=0):
    """Text in which everything stands beside everything."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(("", "", " ")) for _ in range(count))


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*LINES, drawn(2000, 1)], trainer)
    tokenizer.add_special_tokens([AddedToken("<x>", lstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def split(pattern, behaviour="isolated", invert=False):
    """A byte-level BPE behind a pattern, as those of Llama 3, Qwen and Mistral."""
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    first = pre_tokenizers.Split(Regex(pattern), behaviour, invert)
    both = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    end = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    parts = {
        "normalizer": normalizers.NFC(),
        "pre_tokenizer": both,
        "decoder": decoders.ByteLevel(),
        "post_processor": end,
    }
    return trained(models.BPE(), trainer, **parts)


def bert():
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>", "<bos>", "<eos>"], show_progress=False)
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    return trained(models.WordPiece(unk_token="<unk>"), trainer, **parts)


def unigram(*further, split=True):
    """Pieces of words as SentencePiece has them, in a text that is split at spaces or not at all."""
    words = ["<unk>", "<bos>", "<eos>", *"▁abcdehinoprstuwxy.,", "▁the", "▁we", "pe", "op", "le", "▁.", *further]
    tokenizer = Tokenizer(models.Unigram([(word, -float(len(words)) / len(word)) for word in words], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


KNOWN = {
    "gpt2": lambda: byte_tokenizer(bos=True, eos=True),
    "llama3": lambda: split(GPT4),
    "tekken": lambda: split(TEKKEN, "removed", True),
    "bert": bert,
    "t5": unigram,
    "gemma": lambda: unigram(split=False),
    "llama2": fallback_tokenizer,
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(name):
    tokenizer, text = KNOWN[name](), drawn(4000)
    if name == "llama2":  # it begins anew behind an added token
        assert cutter(tokenizer).ends(text, 150) == [len(text)]
        text = text.replace("<bos>", "")
    cut = cutter(tokenizer)
    assert cut is not None
    ends = cut.ends(text, 150)
    assert len(ends) > 20
    assert ends[-1] == len(text)
    for special in (True, False):
        whole, pieces = (encode(tokenizer, [text, "we"], special, piece) for piece in (len(text), 150))
        for a, b in zip(whole[0], pieces[0], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(whole[1].tokens_T, pieces[1].tokens_T)


def changed(tokenizer, change):
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    change(told)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)), eos_token="<eos>")


def added(**flags):
    return lambda told: told["added_tokens"].append(
        {
            "id": 2000,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": False,
            "special": False,
            **flags,
        }
    )


UNKNOWN = {
    "a pattern of chunks": lambda: split(r".{1,7}|\n"),
    "a pattern that looks back": lambda: split(r"(?<=e) ?\p{L}+|" + GPT4),
    "letters that are joined": lambda: split(r" ?\p{L}+ \p{L}+|" + GPT4),
    "matches that are merged": lambda: split(GPT4, "merged_with_next"),
    "tokens of several words": lambda: unigram("▁the▁we", "e.", "e,", split=False),
    "ends that are stripped": lambda: changed(byte_tokenizer(), lambda t: t.update(normalizer={
        "type": "Strip", "strip_left": True, "strip_right": True})),
    "a start that is told from others": lambda: byte_tokenizer(trim=True),
    "a token of two words": lambda: changed(byte_tokenizer(), added(content="we the")),
    "a token with the space behind it": lambda: changed(byte_tokenizer(), added(content="[M", rstrip=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_a_tokenizer_that_might_join_pieces_nothing_is_assumed(name):
    tokenizer, text = UNKNOWN[name](), drawn(300)
    cut = cutter(tokenizer)
    assert cut is None
    whole, pieces = (encode(tokenizer, [text], True, piece)[0] for piece in (len(text), 50))
    np.testing.assert_array_equal(whole.tokens_T, pieces.tokens_T)


def test_a_text_without_a_place_for_a_cut_is_tokenised_whole():
    tokenizer = byte_tokenizer()
    cut = cutter(tokenizer)
    assert cut is not None
    assert cut.ends("ab" * 500, 100) == [1000]
    assert cut.ends("ab" * 500 + " the" + "1" * 500, 100) == [1000, 1504]
