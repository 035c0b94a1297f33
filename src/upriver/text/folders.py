"""A folder that holds a data set: which of its files are data, and which split they belong to."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upriver.errors import CorpusError, InputError

ABOUT = {
    "readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors",
    "code_of_conduct", "dataset_infos", "dataset_info", "dataset_dict", "croissant",
}  # fmt: skip
ABOUT_SUFFIXES = {".py", ".yaml", ".yml", ".bib", ".cff"}
MARKS = (".gitattributes", ".git", "dataset_infos.json")  # of a data set that was cloned
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def about_files(folder: Path, files: Sequence[Path], texts: Sequence[Path], records: Sequence[Path]) -> list[Path]:
    """The files that tell about the data rather than hold it, such as a README or a licence.

    Where all that a folder holds is text, a README is a text like the others, unless the folder shows that it was cloned.

    Args:
        texts, records: those of the files that can be read, as documents or as records.
    """
    about = [file for file in files if _about(file)]
    data_set = bool(set(records) - set(about)) or any((folder / mark).exists() for mark in MARKS)
    return [file for file in about if data_set or file not in texts]


def _about(file: Path) -> bool:
    return file.name.split(".")[0].lower() in ABOUT or file.suffix.lower() in ABOUT_SUFFIXES


def split_of(name: str, text: bool) -> str | None:
    """The split that a file belongs to by its name in the folder: a word of a folder or of the file; of texts, a whole name."""
    path = Path(name.lower())
    parts = [*path.parts[:-1], path.name.split(".")[0]] if text else re.split(r"[-._ 0-9/]+", name.lower())
    return next((SPLITS[part] for part in reversed(parts) if part in SPLITS), None)


def canonical(split: str) -> str:
    """The name of a split, whatever it is called."""
    return SPLITS.get(split.lower(), split)


def one_split(data: Any, split: str | None, error: type[InputError] = CorpusError) -> Any:
    """The rows of a `datasets` data set; of one of its splits, where it has several.

    Raises:
        error: it has several and none of them is named, or another.
    """
    if not isinstance(data, dict):
        return data
    if split == "all" and len(data) > 1:
        from datasets import concatenate_datasets

        return concatenate_datasets(list(data.values()))
    name = next(iter(data)) if len(data) == 1 and split in (None, "all") else split
    if name not in data:
        told = ", ".join(f"{name} ({len(rows):,} rows)" for name, rows in data.items())
        raise error(
            f"which split of the data set is meant: got {told}; say it with --split, such as {next(iter(data))}, or all"
        )
    return data[name]
