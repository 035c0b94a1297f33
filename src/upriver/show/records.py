"""The user's own records of what was scored, read again from their files, and the unit that scores are shown in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from upriver.errors import InputError, MismatchError
from upriver.influence.results import calibration
from upriver.show.folder import Json
from upriver.text.corpus import Corpus, corpus_digest
from upriver.text.reading import Reading
from upriver.text.records import BadRecords, Record, open_corpus, read_records
from upriver.text.shards import Shard

Records = Callable[[], Iterator[Record]]


def scored_records(path: Path, manifest: Json, corpus: str | Path | Corpus | None = None) -> Records:
    """What reads the records that the results in ``path`` are of, from the first on, each time that it is called.

    Args:
        corpus: where the records are now, or the corpus itself; None: where the trace read them.

    Raises:
        MismatchError: the records are not those that were scored.
        InputError: the results are not of a corpus of text, or of one that was in memory.
    """
    told, tokenizer = manifest["corpus"], manifest.get("tokenizer")
    if "seq_len" not in told or not tokenizer:
        raise InputError(f"the results in {path} are not of a corpus of text: their rows are your own, in your order")
    place = corpus.info["path"] if isinstance(corpus, Corpus) else corpus if corpus is not None else told["path"]
    reading = Reading.of(told)

    def skipping() -> BadRecords:
        return BadRecords(reading.on_bad_record)

    if isinstance(corpus, Corpus):
        sources = corpus.sources()
    elif place is None:
        raise InputError(
            "the records of the trace were in memory, so they cannot be read again; give the corpus from Python"
        )
    else:
        shard, places = told["shard"] and Shard(*told["shard"]), place if isinstance(place, list) else [place]
        sources = open_corpus([Path(x) for x in places], skipping(), reading, shard)
    if corpus_digest([x.fingerprint for x in sources], tokenizer["fingerprint"], reading) != told["fingerprint"]:
        raise MismatchError(
            f"the records at {place} are not those that were scored, or were changed since; give the same files with --corpus"
        )
    return lambda: read_records(sources, skipping(), reading)


def shown_unit(manifest: Json, queries: list[Json], columns: list[str]) -> np.ndarray:
    """What raw scores of each column are multiplied by to be shown: nats of one more copy, calibrated where that was measured.

    1 where scores are dot products of gradients, which are in no unit.
    """
    if manifest.get("damping") == "none" or not manifest.get("n_train"):
        return np.ones(len(columns))
    scales = {str(x["id"]): calibration(x.get("solution")) for x in queries}
    return np.array([scales.get(name) or 1.0 for name in columns]) / manifest["n_train"]
