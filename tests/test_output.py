"""What standard output and error are never changes what a command does: it ends with its own status, and all files are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli_cases import build, upriver

SOURCE = Path(__file__).parent.parent / "src"
PRINTS = """
import os, sys
from upriver.show.output import steady_output
with steady_output():
    for n in range(5_000):
        print("\\u00d7 \\U0001f642 line", n)
    print("\\u00d7 \\udcff error", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
"""


def run(code, *args, **how):
    env = os.environ | {"PYTHONPATH": str(SOURCE)} | how.pop("env", {})
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, check=False, timeout=60, **how)


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"}])
def test_what_an_encoding_does_not_have_is_written_out(tmp_path, encoding):
    ended = run(PRINTS, tmp_path / "done", env=encoding, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "done").exists()
    assert ended.stdout.count(b"line") == 5_000
    assert ended.stderr.rstrip().endswith(b"\\udcff error")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_device_and_a_closed_pipe_change_nothing(tmp_path):
    with open("/dev/full", "wb") as full:
        ended = run(PRINTS, tmp_path / "full", stdout=full, stderr=full)
    assert ended.returncode == 0
    read, write = os.pipe()
    os.close(read)
    ended = run(PRINTS, tmp_path / "pipe", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (0, 1)
    ended = run("import os; os.close(1); os.close(2)\n" + PRINTS, tmp_path / "closed", capture_output=True)
    assert ended.returncode == 0
    assert sorted(x.name for x in tmp_path.iterdir()) == ["closed", "full", "pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_command_goes_on_where_its_output_cannot_be_written(tmp_path, capsys, monkeypatch):
    model = build(tmp_path).model
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        ran = upriver(
            capsys, monkeypatch, "plan", model, "1000x16", "--hardware", "h100", "--out", tmp_path / "plan.json"
        )
        assert sys.stdout is full
    assert (ran.status, ran.err.count("error")) == (0, 0), ran.err
    assert json.loads((tmp_path / "plan.json").read_text())["passes"]


def test_an_interruption_while_libraries_are_loaded_is_one_line(tmp_path):
    for name in ("typer", "torch"):  # what is loaded first, and what takes longest
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
        )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom upriver.run import main\nmain()"
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background hears none
    ended = run(heard + code, capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr == b"error: interrupted before anything was begun; give the command again\n"
