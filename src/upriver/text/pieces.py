"""A long text is cut into pieces to be tokenised, where no token can go across, so that the tokens are those of the whole text.

Tokenising takes some 190 bytes for each character at once.  A text is cut behind a letter, before a space or a mark such as a
comma.  That no token goes across, and that nothing on one side decides what becomes of the other, follows from what the
tokenizer says of itself: either what splits the text before the model sees it is known to split there (`SPLITS`, `LETTERS`), or
no token of the vocabulary holds such two characters, so that no merge can join them.  Of other tokenizers nothing is assumed.
"""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]
PIECE = 250_000  # characters
LETTER = "[A-Za-zа-яА-Яぁ-ゖァ-ヺ一-龥가-힣]"
SPACES, MARKS = " \t\n\r", ".,;:!?。、，！？；："
WORD_START = "▁"  # what SentencePiece makes of a space
# splitters of which each splits behind a letter at least before these
SPLITS = {
    "Whitespace": SPACES + MARKS, "BertPreTokenizer": SPACES + MARKS, "WhitespaceSplit": SPACES, "Metaspace": " ",
}  # fmt: skip
NEUTRAL = {"Digits", "Punctuation", "ByteLevel"}  # they split by what single characters are
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING, OTHER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
# alternatives of the patterns of GPT-2, GPT-4, Llama 3, Qwen, o200k and Tekken, which take a run of letters to its end ...
LETTERS = {
    r" ?\p{L}+", r"\p{L}+", OTHER + r"\p{L}+", OTHER + r"[\p{L}\p{M}]+",
    f"{OTHER}{UPPER}+{LOWER}*", f"{OTHER}{UPPER}+{LOWER}*{ENDING}?",
}  # fmt: skip
# ... or none; all look no further than the run that they take and what follows a run of spaces, and never back
OTHERS = {
    f"{OTHER}{UPPER}*{LOWER}+", f"{OTHER}{UPPER}*{LOWER}+{ENDING}?", ENDING, r"'(?i:[sdmt]|ll|ve|re)",
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"[0-9]", r"\d",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
}  # fmt: skip
NORMAL = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend"}  # as to such places


class Cutter(NamedTuple):
    """How the texts of a tokenizer are cut."""

    cut: re.Pattern[str]  # matches the letter before a cut
    later: Tokenizer  # tokenises all pieces but the first
    whole: re.Pattern[str] | None  # texts in which this occurs are not cut

    def ends(self, text: str, piece: int) -> list[int]:
        """Where the pieces of a text end, of at most ``piece`` characters each as far as there are places for a cut."""
        ends, start = [], 0
        if self.whole and self.whole.search(text):
            return [len(text)]
        while len(text) - start > 2 * piece:
            reach, found = piece // 16, None
            while found is None and reach <= piece:
                found = max(
                    (m.end() for m in self.cut.finditer(text, start + piece - min(reach, piece), start + piece)),
                    default=None,
                )
                reach *= 4
            if found is None:
                after = self.cut.search(text, start + piece)
                found = after.end() if after else len(text)
            ends.append(start := found)
        return ends if ends and ends[-1] == len(text) else [*ends, len(text)]


def cutter(tokenizer: PreTrainedTokenizerBase) -> Cutter | None:
    """How long texts are cut for a tokenizer; None where no place is known at which none of its tokens could go across."""
    return _cutter(tokenizer, len(tokenizer))  # pyright: ignore


@lru_cache(2)
def _cutter(tokenizer: Any, size: int) -> Cutter | None:
    backend = tokenizer.backend_tokenizer
    told: Json = json.loads(backend.to_str())
    normal, split = _parts(told["normalizer"], "normalizers"), _parts(told["pre_tokenizer"], "pretokenizers")
    post = _parts(told["post_processor"], "processors")
    spaced = [
        x for x in normal if x["type"] == "Replace" and x["pattern"] == {"String": " "} and x["content"] == WORD_START
    ]
    if any(x["type"] not in NORMAL and x not in spaced for x in normal) or told["model"].get("dropout"):
        return None
    if any(
        x.get("add_prefix_space") and x.get("trim_offsets") for x in post
    ):  # the start of a text is told from others
        return None
    after = _splits(split) if not spaced else ""
    if not after and (spaced or all(x["type"] == "Metaspace" for x in split)):
        after = _never_joined(told["model"], " " if split else " " + MARKS)  # a Metaspace begins a text with a space
    if not after:
        return None
    cut = re.compile(f"{LETTER}(?=[{re.escape(after)}])")
    for token in told["added_tokens"]:
        text = token["content"]
        joins = cut.search(text) or (token["rstrip"] and re.search(f"{LETTER}$", text))
        if joins or (token["single_word"] and text[:1] in after):
            return None
    whole = None
    if any(
        x["type"] == "Prepend" for x in normal
    ):  # it is for the start of the text, and for what follows an added token
        whole = re.compile("|".join(re.escape(token["content"]) for token in told["added_tokens"]) or "(?!)")
        left = [x for x in normal if x["type"] != "Prepend"]
        told["normalizer"] = {"type": "Sequence", "normalizers": left}
        backend = Tokenizer.from_str(json.dumps(told | {"truncation": None, "padding": None}))
    return Cutter(cut, backend, whole)


def _parts(told: Json | None, name: str) -> list[Json]:
    """The steps of a part of a tokenizer."""
    if told is None:
        return []
    return [x for inner in told[name] for x in _parts(inner, name)] if told["type"] == "Sequence" else [told]


def _splits(steps: list[Json]) -> str:
    """The characters before which a text is surely split behind a letter; none where a step is not known."""
    after = ""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and step.get("add_prefix_space"):
            return ""
        if (kind == "ByteLevel" and step.get("use_regex", True)) or (kind == "Split" and _is_known(step)):
            after = SPACES + MARKS
        elif kind in SPLITS and step.get("split", True):
            after = max(after, SPLITS[kind], key=len)
        elif kind not in NEUTRAL:
            return ""
    return after


def _is_known(step: Json) -> bool:
    """Whether a pattern cuts behind every run of letters and looks no further than its neighbour."""
    parts = set(_alternatives(step["pattern"].get("Regex", "")))
    kept = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
    return kept and bool(parts & LETTERS) and parts <= LETTERS | OTHERS


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a pattern, cut at each ``|`` outside of groups and classes."""
    found, depth = [""], 0
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        if piece == "|" and not depth:
            found.append("")
            continue
        depth += (piece in "([") - (piece in ")]")
        found[-1] += piece
    return found


def _never_joined(model: Json, candidates: str) -> str:
    """Those characters that no token has behind a letter, and that are tokens themselves, so that nothing joins them to it."""
    if model["type"] not in ("BPE", "Unigram"):
        return ""
    vocabulary = model["vocab"] if model["type"] == "BPE" else [entry[0] for entry in model["vocab"]]
    joined = {m[1] for token in vocabulary for m in re.finditer(f"(?<={LETTER})([^A-Za-z])", token)}
    alone = set(vocabulary)
    shown = {character: WORD_START if character == " " else character for character in candidates}
    return "".join(c for c, as_token in shown.items() if as_token in alone and as_token not in joined)
