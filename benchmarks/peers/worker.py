"""One side in a process of its own: reads commands and answers them as JSON lines.

    python worker.py SIDE JOB.json           (called by run.py, in the interpreter of the side)

Commands: ``{"do": "fit"}``, ``{"do": "score", "queries": 8, "rank": 32}`` (``null``: full rank), ``{"do": "step"}`` (a plain
training step over the corpus), ``{"do": "reference", "queries": 8}`` (float32 scores at full rank; ours only).  An answer
holds ``seconds`` and ``peak`` (bytes) by phase, and where there are scores their file (``.npy``, sequences by queries,
positive raises the measurement) and ``stored``: the bytes of the solved queries.  What the libraries print goes to stderr.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import read_job
from meter import Meter, resident, settle
from transformers.utils import logging


def answer(side: Any, command: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do one command on a quiet heap, and say what it took."""
    settle()
    before, meter = resident(), Meter()
    reply: dict[str, Any] = {}
    if command["do"] == "score":
        scores_NQ, reply["stored"] = side.score(meter, command["queries"], command["rank"])
    elif command["do"] == "reference":
        scores_NQ = side.reference(command["queries"])
    else:
        scores_NQ = getattr(side, command["do"])(meter)
    if scores_NQ is not None:
        reply["scores"] = str(folder / "scores.npy")
        np.save(reply["scores"], scores_NQ)
    settle()  # what it holds while the others work
    return reply | {"seconds": meter.seconds, "peak": meter.peak, "before": before}


def main() -> None:
    name, job = sys.argv[1], read_job(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(job.threads)
    logging.set_verbosity_error()
    folder = Path(job.folder) / name
    folder.mkdir()
    side = importlib.import_module(f"side_{name}").Side(job, folder)
    settle()
    if not job.as_they_come:
        gc.freeze()  # Kronfluence collects garbage around each phase: 0.4 s a time over what it imports, unless that is set aside
    print(
        json.dumps({"idle": resident(), "torch": torch.__version__, "settings": side.settings}),
        file=replies,
        flush=True,
    )
    for line in sys.stdin:
        print(json.dumps(answer(side, json.loads(line), folder)), file=replies, flush=True)


if __name__ == "__main__":
    main()
