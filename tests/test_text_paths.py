"""Which files are read of a path: links are followed, and what cannot be looked into is an error, never left out."""

import json
import os
from pathlib import Path

import pytest

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import ConfigError, CorpusError, QueryError
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries
from upriver.text.reading import Reading
from upriver.text.records import BadRecords, open_corpus

POLICIES = pytest.mark.parametrize("policy", ["error", "skip"])
READERS = pytest.mark.parametrize(
    ("read", "error"),
    [(lambda path: Corpus.read(path, byte_tokenizer()), CorpusError), (Queries.read, QueryError)],
    ids=["corpus", "queries"],
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A folder with a file and a folder in it."""
    return fill(tmp_path / "texts", "b.txt", "deep/a.txt")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("we the people")
    return folder


def names(folder: Path, policy: str = "error") -> list[str]:
    return [source.name for source in open_corpus([folder], BadRecords(policy), Reading())]


def close(monkeypatch, folder: Path) -> None:
    """Make the folder one that may not be entered, also for root."""

    def closed(function, given):
        def call(path=".", *args, **kwargs):
            at = Path(path) if isinstance(path, str | Path) else None
            if at and (folder in at.parents or (given and at == folder)):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return call

    for name, given in (("listdir", True), ("scandir", True), ("stat", False)):
        monkeypatch.setattr(os, name, closed(getattr(os, name), given))


def test_files_are_sorted_part_by_part_and_hidden_ones_left_out(tmp_path):
    folder = fill(tmp_path / "texts", "b.txt", "a/z.txt", "a.txt", "a-b/c.txt", ".h.txt", ".h/a.txt", "a/.h/.i/a.txt")
    assert names(folder) == ["a/z.txt", "a-b/c.txt", "a.txt", "b.txt"]


def test_links_are_followed(tmp_path, folder):
    other = fill(tmp_path / "other", "one.txt", "two/three.txt")
    (folder / "link").symlink_to(other)
    (folder / "c.txt").symlink_to(other / "one.txt")
    assert names(folder) == ["b.txt", "c.txt", "deep/a.txt", "link/one.txt", "link/two/three.txt"]


def test_a_link_to_a_folder_that_is_read_anyway_adds_nothing(folder):
    """As ``latest`` beside folders of months."""
    (folder / "latest").symlink_to("deep")
    fill(folder / "deep", "er/c.txt")
    (folder / "last").symlink_to(folder / "deep" / "er")
    assert names(folder) == ["b.txt", "deep/a.txt", "deep/er/c.txt"]


def test_a_link_to_what_is_hidden_in_the_folder_is_followed(folder):
    """It is read nowhere else."""
    fill(folder / ".of-november" / "texts", "c.txt")
    (folder / "latest").symlink_to(Path(".of-november", "texts"))
    assert names(folder) == ["b.txt", "deep/a.txt", "latest/c.txt"]


def test_links_that_lead_back_add_nothing(tmp_path, folder):
    (folder / "up").symlink_to("..")
    (folder / "deep" / "here").symlink_to(folder)
    assert names(folder) == ["b.txt", "deep/a.txt"]


def test_folders_that_link_to_each_other(tmp_path, folder):
    other = fill(tmp_path / "other", "one.txt")
    (folder / "there").symlink_to(other)
    (other / "back").symlink_to(folder / "deep")
    (folder / "deep" / "there").symlink_to(other)
    assert names(folder) == ["b.txt", "deep/a.txt", "deep/there/one.txt", "there/one.txt"]


@POLICIES
@pytest.mark.parametrize("name", ["link", "link.txt", "deep/link.png"])
def test_a_link_that_leads_nowhere(folder, name, policy):
    (folder / name).symlink_to("nowhere.txt")
    with pytest.raises(CorpusError, match=f"a link that leads nowhere: got .*{name}; "):
        names(folder, policy)


@POLICIES
def test_a_link_to_itself(folder, policy):
    (folder / "link.txt").symlink_to("link.txt")
    with pytest.raises(CorpusError, match=r"got .*link\.txt' \(Too many levels"):
        names(folder, policy)


@POLICIES
def test_a_folder_that_cannot_be_listed(folder, policy, monkeypatch):
    close(monkeypatch, folder / "deep")
    with pytest.raises(CorpusError, match=r"the folder cannot be listed: got .*deep \(Permission denied\); "):
        names(folder, policy)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@POLICIES
def test_a_folder_without_permissions(folder, policy):
    (folder / "deep").chmod(0)
    with pytest.raises(CorpusError, match="cannot be listed"):
        names(folder, policy)
    (folder / "deep").chmod(0o700)


def test_what_is_hidden_is_not_looked_at(folder, monkeypatch):
    (folder / ".link").symlink_to("nowhere")
    close(monkeypatch, fill(folder / ".closed", "a.txt"))
    assert names(folder) == ["b.txt", "deep/a.txt"]


@READERS
def test_a_path_below_a_folder_that_may_not_be_entered(folder, monkeypatch, read, error):
    path = write_jsonl(folder / "deep" / "q.jsonl", [{"id": "a", "text": "we the people"}])
    close(monkeypatch, folder / "deep")
    with pytest.raises(error, match=r"not a path that can be opened: got .*q\.jsonl' \(Permission denied\); give"):
        read(path)


@READERS
@pytest.mark.parametrize("length", [10, 100, 300, 5000])
def test_content_in_the_place_of_a_path(read, error, length):
    content = json.dumps({"id": "a", "prompt": "we the ", "completion": "x" * length})
    with pytest.raises(error, match=r"got '?\{.*; ") as found:
        read(content)
    assert type(found.value) is error
    assert len(str(found.value)) < 500


def test_a_name_that_is_not_utf_8_gives_an_id_that_can_be_written(folder):
    for name in (b"caf\xe9.jsonl", b"caf\xe8.jsonl"):
        write_jsonl(folder / os.fsdecode(name), [{"text": "we the people"}])
    corpus = Corpus.read(folder, byte_tokenizer())
    ids = [corpus.document_id(n) for n in range(corpus.n_documents)]
    assert len({name.encode() for name in ids}) == len(ids) == 4


@READERS
@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have(read, error, name):
    with pytest.raises(error, match="no such file or folder"):
        read(name)


def test_a_cache_of_a_name_that_is_too_long(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "we the people"}])
    with pytest.raises(ConfigError, match="UPRIVER_CACHE"):
        Corpus.read(path, byte_tokenizer(), cache=tmp_path / ("x" * 300))
