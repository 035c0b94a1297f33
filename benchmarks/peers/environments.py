"""The virtual environments of the peers: built once, used again while what they should hold stays the same.

Each holds the torch of ``constraints.txt``, the same as ours, so that all sides multiply with the same library.
"""

import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
COMMON = ["torch", "transformers", "safetensors", "numpy", "datasets", "accelerate"]
# The peer itself without its dependencies, then those that it really imports: Kronfluence would also bring what it is tested
# with; Bergson torchvision, torchaudio and bitsandbytes, which it never imports and of which the first needs its own torch.
PEERS = {
    "kronfluence": (["kronfluence==1.0.1", "einconv"], ["einops", "opt_einsum", "scikit-learn"]),
    "bergson": (
        ["bergson==2.5.1"],
        ["jinja2", "jaxtyping", "ml_dtypes", "natsort", "scipy", "peft", "petname", "pyarrow", "pyyaml", "simple-parsing",
         "torchopt", "huggingface-hub"],
    ),
}  # fmt: skip


def python_of(side: str, place: Path) -> Path:
    """The interpreter that runs ``side``: ours is this one, a peer's that of its environment under ``place``."""
    if side == "ours":
        return Path(sys.executable)
    folder = place / side
    python, note = folder / "bin" / "python", folder / "holds.txt"
    holds = repr(PEERS[side]) + repr(COMMON) + CONSTRAINTS.read_text()
    if not note.exists() or note.read_text() != holds:
        print(f"building {folder}", file=sys.stderr)
        _build(folder, python, *PEERS[side])
        note.write_text(holds)
    return python


def _build(folder: Path, python: Path, peer: list[str], needed: list[str]) -> None:
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(CONSTRAINTS), *COMMON, *needed], check=True)
    subprocess.run([*pip, "--no-deps", *peer], check=True)
