"""Imports go one way: also those inside of functions, no file leads back to itself."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastlora

PACKAGE = Path(fastlora.__file__).parent


def modules(package: Path) -> dict[str, Path]:
    """The package's files by module name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the package's modules that it imports by name.

    `from fastlora import ops` means `fastlora.ops`, not `fastlora`: a package's own `__init__` runs
    first whatever part of it is wanted, and re-exports what is below.
    """
    files = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    wanted.append(inner if inner in files else node.module)
            graph[name] |= {w for w in wanted if w in files}
    return graph


def test_no_circles():
    graph = imports(PACKAGE)
    assert len(graph) > 50 and sum(map(len, graph.values())) > 150  # something was read
    TopologicalSorter(graph).prepare()  # CycleError names a circle


def test_circles_are_found(tmp_path):
    package = tmp_path / "fastlora"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from fastlora.b import g\n    return g\n")
    (package / "b.py").write_text("from fastlora import a\n")
    with pytest.raises(CycleError, match="fastlora.a"):
        TopologicalSorter(imports(package)).prepare()


def test_layers_below_do_not_know_those_above():
    allowed = {
        "formats": set(),
        "models": set(),
        "ops": set(),
        "adapters": {"ops", "formats"},
        "samplers": {"ops", "adapters"},
        "training": {"ops", "adapters", "samplers"},
        "methods": {"ops", "adapters", "samplers", "training", "models", "formats"},
        "integrations": {"ops", "adapters", "samplers", "formats"},
    }
    graph = imports(PACKAGE)
    for part, below in allowed.items():
        for name, wanted in graph.items():
            if not name.startswith(f"fastlora.{part}"):
                continue
            parts = {w.split(".")[1] for w in wanted if "." in w} - {part}
            assert parts <= below, name
            assert "fastlora" not in wanted, name
