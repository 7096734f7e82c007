"""The house: no circle of files, no import that runs up, none hidden, nothing private from elsewhere, short methods."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sources import ORDER, Edge, Sources, circles, is_private, level, lines_of_code

import tdhook
from tdhook.attribution import Attribution, catalogue

SOURCES = Sources.of(Path(tdhook.__file__).parent)
# A command loads what it needs and no more, so that `tdhook --help` is quick.
LOADS_LATE = "tdhook.cli"
# The doors load a name when it is asked for, so that `import tdhook` is quick, and `tdhook.rl` does without extras.
DOORS = ("tdhook", "tdhook.rl")

# A method is its algorithm; what several share stands beside them.
LINES_OF_A_METHOD = 60
# Any model under any rules, and two runs of one model with every way to put one into the other.
LONGER = {"tdhook.attribution.lrp", "tdhook.attribution.patching"}

# What derives from classes of an extra is loaded once the extra is there.
NEEDS_AN_EXTRA = {("tdhook.rl.environments", "tdhook.rl.frames")}


def runs_up(edge: Edge) -> bool:
    return level(edge.to) > level(edge.source)


def is_hidden(edge: Edge) -> bool:
    return edge.hidden and not f"{edge.source}.".startswith(f"{LOADS_LATE}.")


def described(edges: list[Edge]) -> list[str]:
    return [f"{edge.source} imports {', '.join(edge.names) or 'all'} of {edge.to}" for edge in edges]


def package(module: str) -> str:
    """The folder that a file is in: what is private there is its own."""
    return module if module in SOURCES.packages else module.rpartition(".")[0]


def test_no_files_import_each_other() -> None:
    assert circles(SOURCES.graph()) == []


def test_imports_run_down() -> None:
    assert described(list(filter(runs_up, SOURCES.edges))) == []


def test_no_import_is_hidden_in_a_function() -> None:
    assert described(list(filter(is_hidden, SOURCES.edges))) == []


def test_every_file_has_its_place() -> None:
    homeless = [module for module in SOURCES.texts if ORDER[level(module)] == "tdhook" != module]
    assert homeless == []
    unknown = [name for name in ORDER if name not in SOURCES.texts]
    assert unknown == []


def test_only_doors_import_the_package_by_name() -> None:
    found = set()
    for module, tree in SOURCES.trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] != "import_module":
                continue
            named = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if named is None or named.startswith("tdhook"):
                found.add((module, named))
    by_name = {(module, named) for module, named in found if named is not None}
    assert by_name <= NEEDS_AN_EXTRA, by_name
    # By a name that is worked out: the doors, what imports packages that may be missing, and a user's own module.
    assert {module for module, named in found if named is None} <= {
        *DOORS,
        "tdhook.extras",
        "tdhook.rl.environments",
        "tdhook.cli.policies",
    }


def test_what_is_private_stays_in_its_folder() -> None:
    taken = [
        edge
        for edge in SOURCES.edges
        if any(map(is_private, [*edge.names, *edge.to.split(".")]))
        and package(edge.source) != package(edge.to)
    ]
    assert described(taken) == []


def test_a_method_is_a_short_file() -> None:
    methods = [kind for kind in vars(catalogue).values() if isinstance(kind, type)]
    files = {kind.__module__ for kind in methods if issubclass(kind, Attribution) and kind is not Attribution}
    lines = {name: lines_of_code(SOURCES.texts[name]) for name in files}
    assert {name for name, count in lines.items() if count > LINES_OF_A_METHOD} == LONGER, lines


@pytest.mark.parametrize(
    "text, count",
    [
        ('"""Said.\n\nMore."""\n\nx = 1  # a comment\n', 1),
        ('def f():\n    """Said."""\n    # a comment\n    return """a\n    b"""\n', 3),
        ("x = [\n    1,\n\n    2,\n]\n", 4),
        ('X = 1\n"""What it is."""\n', 1),
    ],
)
def test_lines_of_code_are_counted(text: str, count: int) -> None:
    assert lines_of_code(text) == count


@pytest.mark.parametrize(
    "texts, found",
    [
        ({"tdhook.a": "import tdhook.b", "tdhook.b": "from tdhook import a"}, [["tdhook.a", "tdhook.b"]]),
        (
            {"tdhook.a": "def f():\n    from tdhook.b import x", "tdhook.b": "from .a import y"},
            [["tdhook.a", "tdhook.b"]],
        ),
        ({"tdhook.a": "if TYPE_CHECKING:\n    import tdhook.b", "tdhook.b": "import tdhook.a"}, []),
        ({"tdhook.a": "import tdhook.b", "tdhook.b": "import tdhook.c", "tdhook.c": ""}, []),
    ],
)
def test_circles_are_found(texts: dict[str, str], found: list[list[str]]) -> None:
    assert circles(Sources({"tdhook": "", **texts}, frozenset({"tdhook"})).graph()) == found


def test_levels_are_those_of_the_longest_name() -> None:
    assert (
        level("tdhook.relevance.rules.epsilon") < level("tdhook.relevance.plans.plan") < level("tdhook.rules")
    )
    assert level("tdhook.keys") == 0 and level("tdhook.cli.tables") == len(ORDER) - 1
    assert level("tdhook.rulesets") == level("tdhook")
