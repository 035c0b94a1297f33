"""The report's content for other programs: JSON, JSONL for the public viewer of the TrackStar paper (PAIR), CSV."""

import csv
import io
import json

from upriver.show.folder import Json

CSV_COLUMNS = (
    "query",
    "side",
    "rank",
    "sequence",
    "document",
    "start",
    "end",
    "score",
    "score_nats",
    "rescored",
    "spurious",
    "tfidf_rank",
    "overlap",
    "duplicate_of",
    "metadata",
    "text",
)


def json_text(report: Json) -> str:
    return json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n"


def jsonl_text(report: Json) -> str:
    """A line per query in the schema of PAIR's ``pretraining-tda``; scores in nats where they are known."""
    return "".join(json.dumps(_example(query), ensure_ascii=False) + "\n" for query in report["queries"])


def _example(query: Json) -> Json:
    example = {
        "example_id": str(query["id"]),
        "query_set": "upriver",
        "inputs_plaintext": query["prompt"] or "",
        "targets_plaintext": query["completion"] or "",
    }
    for side, name in (("positive", "proponent"), ("negative", "opponent")):
        passages = [p for p in query["passages"] if p["side"] == side]
        example[f"{name}s"] = [p["text"] for p in passages]
        example[f"{name}_ids"] = [f"{p['document']}:{p['start']}-{p['end']}" for p in passages]
        example[f"{name}_scores"] = [p["score"] if p["score_nats"] is None else p["score_nats"] for p in passages]
    return example


def csv_text(report: Json) -> str:
    """A row per passage and query, without the lists of tokens and layers."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerow(CSV_COLUMNS)
    # quoted, as some versions of Python leave a lone \r bare otherwise
    writer = csv.writer(sink, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for query in report["queries"]:
        for passage in query["passages"]:
            metadata = json.dumps(passage["metadata"], ensure_ascii=False)
            row = {**passage, "query": query["id"], "metadata": metadata}
            writer.writerow([row[column] for column in CSV_COLUMNS])
    return sink.getvalue()
