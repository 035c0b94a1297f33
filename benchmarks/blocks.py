"""Rewrite the blocks of docs/cost.md and docs/gpu.md that are counted, not measured: below each command what it prints.

    python benchmarks/blocks.py

They depend on the code alone, not on the machine.  `make docs` runs this.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {"cost.md": ("layer", "limits", "plan 52b", "plan 7b"), "gpu.md": ("one card",)}
PROGRAMS = {"python": [sys.executable], "upriver": [sys.executable, "-m", "upriver.cli"]}


def printed(command: str) -> str:
    """A command and what it prints: Markdown, or the lines of a plan."""
    program, *args = shlex.split(command)
    ran = subprocess.run([*PROGRAMS[program], *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    out = ran.stdout.strip()
    return f"`{command}`:\n\n" + (out if program == "python" else f"```\n{out}\n```")


def renewed(block: re.Match[str]) -> str:
    commands = re.findall(r"^`(.+)`:$", block[2], re.MULTILINE)
    return block[1] + "\n\n".join(map(printed, commands)) + block[3]


def main() -> None:
    for page, names in PAGES.items():
        text = (ROOT / "docs" / page).read_text()
        for name in names:
            block = re.compile(rf"(<!-- {name}: begin -->\n)(.*?)(\n<!-- {name}: end -->)", re.DOTALL)
            text, found = block.subn(renewed, text)
            assert found == 1, f"{page} has {found} blocks {name!r}"
        (ROOT / "docs" / page).write_text(text)


if __name__ == "__main__":
    main()
