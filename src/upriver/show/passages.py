"""Some things can be said about passages from their text: sentences, near-duplicates, words shared with the query."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

SHINGLE = 5  # words
CACHED = 2048  # passages: one that several questions show is looked at once
JACCARD, CONTAINED = 0.5, 0.9  # near-duplicates: share of common shingles, or share of the shorter one's

WORD = re.compile(r"\w+")
# A full stop, question or exclamation mark with closing quotes, or a full-width one, or an empty line.
SENTENCE_END = re.compile(r"[.!?…؟۔।]+[\"'”’»)\]]*(?=\s)|[。！？]+[」』”’]*|\n\s*\n|(?<=[^\s])\n(?=\s*[-*•\d])")
SENTENCES = 400
ABBREVIATION = re.compile(r"(?:^|[\s(\"“‘])(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs|etc|e\.g|i\.e|[A-Z]|(?:[A-Z]\.)+[A-Z])\.$")
# Words so common that sharing them with a query says nothing.
_COMMON = (
    "a about an and are as at be been but by can did do does for from had has have he her his how i if in into is it "
    "its me my no not of on or our she so than that the their them then there these they this to was we were what when "
    "where which who will with would you your"
)
COMMON = frozenset(_COMMON.split())


def sentences(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Find the sentences of a passage, at most ``SENTENCES``, as token spans ``[start, end)`` that cover every token once."""
    return _sentences(tuple(tokens))


@lru_cache(CACHED)
def _sentences(tokens: tuple[str, ...]) -> list[tuple[int, int]]:
    text = "".join(tokens)
    found = [match.end() for match in SENTENCE_END.finditer(text)]
    ends = [end for end in found if not ABBREVIATION.search(text[max(0, end - 12) : end])]
    starts = np.cumsum([0, *map(len, tokens)])[:-1]
    # where a token's first visible character stands; white space alone belongs to the sentence before it
    lead = [len(token) - len(token.lstrip()) if token.strip() else -1 for token in tokens]
    first = starts + np.array(lead, np.int64)
    number = np.searchsorted(ends, first, side="right")
    breaks = [0, *(np.flatnonzero(np.diff(number) > 0) + 1).tolist(), len(tokens)]
    spans = [(a, b) for a, b in pairwise(breaks) if a < b]
    return spans[: SENTENCES - 1] + [(a, len(tokens)) for a, _ in spans[SENTENCES - 1 : SENTENCES]]


@lru_cache(CACHED)
def shingles(text: str) -> frozenset[int]:
    """The hashes of the runs of five words of a text; of eight characters where it has no words to speak of."""
    words = [word.casefold() for word in WORD.findall(text)]
    if len(words) < SHINGLE:
        joined = "".join(words) or "".join(text.split())
        return frozenset(hash(joined[i : i + 8]) for i in range(max(1, len(joined) - 7)))
    return frozenset(hash(" ".join(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1))


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """Find for each text the index of the first text that it nearly repeats (its own, when there is none).

    Two texts are near-duplicates when the Jaccard index of their word 5-shingles is at least 0.5, or when 90 % of the
    shorter one's are in the longer one.
    """
    leaders: dict[int, list[int]] = {}  # shingle -> the leaders that have it
    sizes: dict[int, int] = {}
    group = []
    for i, own in enumerate(map(shingles, texts)):
        shared = Counter(j for shingle in own for j in leaders.get(shingle, ())) if texts[i].strip() else {}
        similar = (
            j
            for j in sorted(shared)
            if shared[j] >= JACCARD * (len(own) + sizes[j] - shared[j])
            or shared[j] >= CONTAINED * min(len(own), sizes[j])
        )
        group.append(next(similar, i))
        if group[i] == i:
            sizes[i] = len(own)
            for shingle in own:
                leaders.setdefault(shingle, []).append(i)
    return group


def query_words(query: str) -> frozenset[str]:
    """List the words of a query that say something when a passage shares them."""
    words = {word.casefold() for word in WORD.findall(query)}
    return frozenset(word for word in words - COMMON if len(word) > 2 or not word.isascii())


def matches(tokens: Sequence[str], words: frozenset[str]) -> list[int]:
    """Find the indices of the tokens that belong to a word of the query."""
    places = _places(tuple(tokens))
    return sorted({i for word in words for i in places.get(word, ())})


@lru_cache(CACHED)
def _places(tokens: tuple[str, ...]) -> dict[str, list[int]]:
    """The tokens of each word of a passage."""
    text = "".join(tokens)
    starts = np.cumsum([0, *map(len, tokens)])
    found = list(WORD.finditer(text))
    first = np.searchsorted(starts, [match.start() + 1 for match in found], side="left") - 1
    last = np.searchsorted(starts, [match.end() for match in found], side="left")
    places: dict[str, list[int]] = {}
    for match, a, b in zip(found, first.tolist(), last.tolist(), strict=True):
        places.setdefault(match.group().casefold(), []).extend(i for i in range(a, b) if tokens[i].strip())
    return places


def concentration(token_scores: np.ndarray) -> float | None:
    """Compute ``||tok||_2 / ||tok||_1``, which is 1 when a single token holds all; above 2/3 a passage is called spurious."""
    total = float(np.abs(token_scores).sum())
    return float(np.linalg.norm(token_scores)) / total if total > 0 else None
