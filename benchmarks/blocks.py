"""Rewrite the blocks of docs/cost.md that are counted, not measured: below each command what it prints.

    python benchmarks/blocks.py

They depend on the code alone, not on the machine.  `make docs` runs this.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cost.md"
COUNTED = ("layer", "limits", "plan 52b", "plan 7b")
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
    text = PAGE.read_text()
    for name in COUNTED:
        block = re.compile(rf"(<!-- {name}: begin -->\n)(.*?)(\n<!-- {name}: end -->)", re.DOTALL)
        text, found = block.subn(renewed, text)
        assert found == 1, f"{PAGE} has {found} blocks {name!r}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
