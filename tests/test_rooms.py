"""The rooms of the package stand in the order of docs/design.md's map, and every import leads to a room above.

Imports that only a type checker reads do not count, nor do the chapters that a package loads when first asked for.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxsoftmax"
DESIGN = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
MOST_ARROWS = 38


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def rooms_of_the_map() -> list[str]:
    """The first column of the map's table, from the ground up."""
    table = re.search(r"^\| room \|.*?(?=\n\n)", DESIGN, re.MULTILINE | re.DOTALL)
    assert table is not None
    return [room for line in table[0].splitlines()[2:] for room in re.findall(r"`(\w+)/?`", line.split("|")[1])]


def imported(tree: ast.AST) -> Iterator[str]:
    """The package's modules that are imported below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in SOURCES else str(node.module) for name in inside)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        yield from imported(node)


IMPORTS = {
    name: {other for other in imported(ast.parse(text)) if other in SOURCES and other != name}
    for name, text in SOURCES.items()
}


def room(module: str) -> str:
    return module.split(".")[1]


ROOMS = rooms_of_the_map()
ARROWS = {
    (room(name), room(other))
    for name, others in IMPORTS.items()
    for other in others
    if name != "jaxsoftmax" and room(name) != room(other)
}


def test_every_room_is_on_the_map_once():
    assert sorted(ROOMS) == sorted({room(name) for name in SOURCES if name != "jaxsoftmax"})


def test_imports_lead_upwards_on_the_map():
    place = {name: i for i, name in enumerate(ROOMS)}
    assert not {arrow for arrow in ARROWS if place[arrow[0]] < place[arrow[1]]}
    assert len(ARROWS) <= MOST_ARROWS


def test_nothing_imports_the_teaching_wing():
    wing = {"matrix_calculus", "network"}
    assert not {arrow for arrow in ARROWS if arrow[1] in wing and arrow[0] not in wing}


def test_no_file_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_stand_at_the_top_and_files_are_short(module):
    """matplotlib, which is optional, is imported where a picture is drawn."""
    tree = ast.parse(SOURCES[module])
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [node for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all("matplotlib" in ast.unparse(node) for node in inside)
    assert SOURCES[module].count("\n") <= 400
