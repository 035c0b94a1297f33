"""``verify.parquet`` and ``verify.json``, beside the results that they verify.

``verify.json`` is written last and holds the checksum of the table; its own covers the key of the trace, so that a verification
of another trace is refused.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import MismatchError
from upriver.influence.results import parquet
from upriver.runtime.artifact import checksum, first_difference, read_json, unreadable, write_json

HEAD, TABLE = "verify.json", "verify.parquet"
F64, STR = pa.float64(), pa.string()
SCHEMA = pa.schema(
    [
        ("query", STR), ("sequence", pa.int64()), ("shown", pa.bool_()), ("predicted_nats", F64), ("realised_nats", F64),
        ("side", STR), ("rank", pa.int64()), ("residual", F64), ("length", F64), ("calibrated_nats", F64),
    ]
)  # fmt: skip
AGAIN = "give `upriver verify` again with --overwrite"


def compared(pairs: Any) -> Any:
    """What realised nats are held against: the calibrated prediction where the trace made one, else the plain one."""
    return (
        pairs["calibrated_nats"].fillna(pairs["predicted_nats"])
        if "calibrated_nats" in pairs
        else pairs["predicted_nats"]
    )


def read_verified(scores: Path) -> tuple[dict[str, Any], pd.DataFrame] | None:
    """What a finished verification found: the summary and the table; None where there is none.

    Raises:
        StorageError: it is damaged, or of another trace.
    """
    head, table = scores / HEAD, scores / TABLE
    if not head.exists():
        return None
    told = read_json(head, AGAIN)
    if not isinstance(told, dict) or "key" not in told:
        raise unreadable(head, "no verification wrote it", "move it away")
    if not table.exists() or checksum(table) != told["files"].get(TABLE):
        raise unreadable(table, "its checksum is not that of its content: it is damaged, or is not there", AGAIN)
    with open(table, "rb") as raw:  # arrow does not take every path
        return told, pq.read_table(raw).to_pandas()


def write_verified(scores: Path, frame: pd.DataFrame, told: dict[str, Any]) -> None:
    """The table, and then the summary that makes it count."""
    frame["rank"] = frame["rank"].astype("Int64")
    (scores / HEAD).unlink(missing_ok=True)
    with parquet(scores / TABLE, 1, SCHEMA) as add:
        add(frame)
    write_json(scores / HEAD, told | {"files": {TABLE: checksum(scores / TABLE)}})


def check_place(scores: Path, key: dict[str, Any], overwrite: bool) -> bool:
    """Whether a verification of the same key is finished here.

    Raises:
        MismatchError: one of another key is, or a table that no verification wrote.
        StorageError: what is there is damaged.
    """
    table = scores / TABLE
    if table.exists() and not _is_ours(table):
        raise MismatchError(f"{table} is there and no verification wrote it: move it away")
    if overwrite and (table.exists() or not (scores / HEAD).exists()):
        return False
    found = read_verified(scores)
    if found and (difference := first_difference(found[0]["key"], key)):
        name, old, new = difference
        raise MismatchError(
            f"{scores} was verified with another {name}: got {new!r} now, {old!r} then; go back to the earlier value, or "
            "add --overwrite to replace it"
        )
    return found is not None


def _is_ours(table: Path) -> bool:
    try:
        with open(table, "rb") as raw:
            return pq.read_schema(raw).names == SCHEMA.names
    except (OSError, pa.ArrowException):
        return False
