"""How large the report is, how long it takes to write, and to open in a browser.

    python benchmarks/report.py                       # 100 questions, 100 passages of 512 tokens of each: about two minutes
    python benchmarks/report.py --questions 1500 --passages 200 --tokens 64

Results are made up (``tests/report_fixture.py``); the page is opened by a headless Chromium, three times, from an empty profile.
``drawn``: from the start of the navigation until the first question and its passages stand on the page.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from report_fixture import write_scores
from test_report_browser import CHROMIUM, drawn
from upriver.show.report import write_report

PAINTED = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"


def picture_of(page: Path, picture: Path) -> None:
    flags = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "hide-scrollbars",
        "window-size=1400,1000",
        "virtual-time-budget=20000",
    )
    command = [str(CHROMIUM), *(f"--{flag}" for flag in flags), f"--screenshot={picture}", page.resolve().as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--passages", type=int, default=100, help="of a question, on both sides")
    parser.add_argument("--tokens", type=int, default=512, help="of a passage, about")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--picture", type=Path, help="where to write a picture of the page")
    parser.add_argument("--work", type=Path, help="where results and report are left. Default: nowhere")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = args.work or Path(temporary)
        if not (work / "scores").exists():
            write_scores(work / "scores", args.questions, args.passages // 2, args.tokens, args.documents)
        warnings.simplefilter("ignore")
        start = time.process_time()
        page = write_report(work / "scores", work / "page")
        seconds = time.process_time() - start
        sizes = {file.name: round(file.stat().st_size / 1e6, 2) for file in sorted((work / "page").iterdir())}
        opened = [drawn(page, Path(temporary) / str(i), wanted=PAINTED) / 1000 for i in range(3 * bool(CHROMIUM))]
        if args.picture:
            picture_of(page, args.picture)
    told = {
        "questions": args.questions,
        "passages": args.passages,
        "tokens": args.tokens,
        "written_cpu_s": round(seconds, 1),
    }
    print(json.dumps(told | {"MB": sizes, "drawn_s": [round(x, 2) for x in opened]}))
    if opened:
        print(f"opened in {statistics.median(opened):.2f} s, the median of three")


if __name__ == "__main__":
    main()
