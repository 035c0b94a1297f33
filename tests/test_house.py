"""The house: imports point upwards only, one hook, one importer of torch.distributed, and files of readable size."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "upriver"
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
    "flags",
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
