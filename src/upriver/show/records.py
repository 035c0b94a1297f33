"""The user's own records of what was scored, read again from their files, and the unit that scores are shown in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from upriver.errors import InputError, MismatchError
from upriver.influence.results import calibration
from upriver.show.folder import Json
from upriver.text.corpus import corpus_digest
from upriver.text.records import BadRecords, Record, open_corpus, read_records

Records = Callable[[], Iterator[Record]]


def scored_records(path: Path, manifest: Json, corpus: str | Path | None = None) -> Records:
    """What reads the records that the results in ``path`` are of, from the first on, each time that it is called.

    Args:
        corpus: where the records are now; None: where the trace read them.

    Raises:
        MismatchError: the records are not those that were scored.
        InputError: the results are not of a corpus of text.
    """
    told, tokenizer = manifest["corpus"], manifest.get("tokenizer")
    if "seq_len" not in told or not tokenizer:
        raise InputError(f"the results in {path} are not of a corpus of text: their rows are your own, in your order")
    place = Path(corpus if corpus is not None else told["path"])

    def skipping() -> BadRecords:
        return BadRecords(told["on_bad_record"])

    sources = open_corpus(place, skipping())
    settings = {name: told[name] for name in ("seq_len", "pack", "on_bad_record")}
    if corpus_digest([x.fingerprint for x in sources], tokenizer["fingerprint"], settings) != told["fingerprint"]:
        raise MismatchError(
            f"the records at {place} are not those that were scored, or were changed since; give the same files with --corpus"
        )
    return lambda: read_records(sources, skipping())


def shown_unit(manifest: Json, queries: list[Json], columns: list[str]) -> np.ndarray:
    """What raw scores of each column are multiplied by to be shown: nats of one more copy, calibrated where that was measured.

    1 where scores are dot products of gradients, which are in no unit.
    """
    if manifest.get("damping") == "none" or not manifest.get("n_train"):
        return np.ones(len(columns))
    scales = {str(x["id"]): calibration(x.get("solution")) for x in queries}
    return np.array([scales.get(name) or 1.0 for name in columns]) / manifest["n_train"]
