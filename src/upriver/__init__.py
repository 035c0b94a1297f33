"""Upriver follows a language model's answer upriver, to the training text it came from.

Example:
    >>> import upriver as up
    >>> model = up.load_model("path/or/name")
    >>> corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=512)
    >>> factors = up.fit(model, corpus, out="factors")
    >>> result = up.trace(model, corpus, up.Queries.read("queries.jsonl"), factors, out="scores")
    >>> result.top("q1", 10)  # a pandas frame
    >>> result.report("report.html")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upriver.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Load the public names at the first use of one: the command line sets what torch reads when it is loaded before that."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'upriver' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("upriver.public"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
