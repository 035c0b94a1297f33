"""The house: imports point upwards only, one hook, one importer of torch.distributed, and files of readable size."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "upriver"
WALK = Path(__file__).with_name("house_walk.py")
ROOMS = [
    "errors",
    "kernels",
    "tensors",
    "runtime",
    "text",
    "model",
    "curvature",
    "influence",
    "evaluate",
    "show",
    "pipeline",
    "suspects",
    "flags",
    "given",
    "proof",
    "planning",
    "public",
    "cli",
    "run",
]
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST) -> list[str]:
    """Every module imported anywhere in the file, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room they come from"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_to_rooms_above(path: Path):
    own = path.relative_to(SOURCE).with_suffix("").parts[0]
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("upriver"):
            assert "." in name, f"{path.name} imports the package itself"
            assert ROOMS.index(room(name)) <= ROOMS.index(own), f"{path.name} imports {name} from a room below it"


def test_what_benchmarks_and_studies_take_from_the_package_is_there():
    """They run seldom, and would be found broken only then."""
    root, lacking = SOURCE.parent.parent, []
    for path in sorted([*(root / "benchmarks").rglob("*.py"), *(root / "studies").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "upriver":
                module = importlib.import_module(str(node.module))
                lacking += [f"{path.name}: {node.module}.{x.name}" for x in node.names if not hasattr(module, x.name)]
    assert lacking == []


def test_no_import_cycles_inside_a_room():
    graph = {}
    for path in FILES:
        name = "upriver." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        graph[name] = {m for m in imports(ast.parse(path.read_text())) if m.startswith("upriver.")}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        for following in graph.get(start, ()):
            if following == goal:
                return True
            if following not in seen:
                seen.add(following)
                if reaches(following, goal, seen):
                    return True
        return False

    assert [name for name in graph if reaches(name, name, set())] == []


def test_one_importer_of_torch_distributed():
    users = [p.name for p in FILES if any(m.startswith("torch.distributed") for m in imports(ast.parse(p.read_text())))]
    assert users == ["dist.py"]


def test_one_backward_hook():
    users = [p.name for p in FILES if "register_hook(" in p.read_text()]
    assert users == ["capture.py"]


def test_files_and_functions_stay_readable():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.name} is longer than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path.name}: {node.name} is longer than 80 lines"


def test_no_pickle_and_no_side_effects_of_printing():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not {"pickle", "dill", "joblib"} & set(imports(tree)), path.name
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not calls, f"{path.name} prints"


# ---- how far a reader has to go; `pytest tests/test_house.py -s -k house_is` prints what was counted

MAIN_PATH = [
    "pipeline", "model/capture", "model/sweep", "curvature/fit", "curvature/blocks", "influence/solve", "influence/scan",
]  # fmt: skip


def own_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("upriver"):
            packages = node.module in ("upriver", "upriver.runtime", "upriver.model", "upriver.curvature")
            found |= {f"{node.module}.{x.name}" for x in node.names} if packages else {node.module}
    return found


def test_the_house_is_no_larger_than_it_was_counted(tmp_path):
    """Bounds are what was reached, a little above; what was asked of the house is in brackets."""
    env = os.environ | {
        "UPRIVER_CACHE": str(tmp_path / "cache")
    }  # what others left in theirs is read by functions more
    walked = subprocess.run([sys.executable, WALK, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert walked.returncode == 0, walked.stderr
    through = json.loads(walked.stdout)
    files = {name: {file for file, _ in calls} for name, calls in through.items()}
    main = sum((SOURCE / f"{name}.py").read_text().count("\n") for name in MAIN_PATH)
    lines = sum(path.read_text().count("\n") for path in FILES)
    counted = {
        "files of the main path (6)": (len(MAIN_PATH), 7),
        "lines of the main path (1,300)": (main, 1_405),
        "files run in a fit (17)": (len(files["fit"]), 41),
        "functions run in a fit (156)": (len(through["fit"]), 371),
        "files run in a trace (23)": (len(files["trace"]), 58),
        "functions run in a trace (200)": (len(through["trace"]), 513),
        "own imports of a module, tenths (32)": (10 * sum(len(own_imports(p)) for p in FILES) // len(FILES), 68),
        "lines of Python (9,500)": (lines, 23_350),
    }
    for name, (found, bound) in counted.items():
        print(f"{name:40} {found:7,}   at most {bound:,}")
    assert all(found <= bound for found, bound in counted.values())
