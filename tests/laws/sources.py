"""The source of the package as data: which file imports which, and what is private in whom."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

__all__ = ["ORDER", "Edge", "Sources", "circles", "is_private", "level", "lines_of_code"]

ORDER = (
    "tdhook.keys",
    "tdhook.conventions",
    "tdhook.extras",
    "tdhook.markup",
    "tdhook.files",
    "tdhook.plain",
    "tdhook.tables",
    "tdhook.tape",
    "tdhook.models",
    "tdhook.perturbing",
    "tdhook.targets",
    "tdhook.selectors",
    "tdhook.passes",
    "tdhook.contexts",
    "tdhook.relevance.secants",
    "tdhook.relevance.propagation",
    "tdhook.relevance.rules",
    "tdhook.relevance.operations",
    "tdhook.relevance.ledger",
    "tdhook.relevance.composites",
    "tdhook.relevance.plans",
    "tdhook.relevance",
    "tdhook.rules",
    "tdhook.composites",
    "tdhook.attribution",
    "tdhook",
    "tdhook.configuration",
    "tdhook.evaluation",
    "tdhook.rl",
    "tdhook.datasets",
    "tdhook.concepts",
    "tdhook.plots",
    "tdhook.video",
    "tdhook.pages",
    "tdhook.cli",
)
"""Folders and files, each of which uses only what stands above it."""


class Edge(NamedTuple):
    """One file imports another.

    Attributes:
        source: the dotted name of the file that imports.
        to: that of the file that is imported.
        names: what is taken from it; none if it is imported as a whole.
        hidden: whether the import is in a function.
    """

    source: str
    to: str
    names: tuple[str, ...]
    hidden: bool


def level(module: str) -> int:
    """The place of a file in :data:`ORDER`: that of the longest name there that it is, or is in."""
    return max((len(name), place) for place, name in enumerate(ORDER) if f"{module}.".startswith(f"{name}."))[
        1
    ]


@dataclass(frozen=True)
class Sources:
    """The files of a package.

    Attributes:
        texts: source by dotted name.
        packages: the names that are folders.
    """

    texts: dict[str, str]
    packages: frozenset[str]

    @staticmethod
    def of(folder: Path) -> Sources:
        """The package in a folder, which has its name."""
        texts, packages = {}, set()
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
                packages.add(".".join(parts))
            texts[".".join(parts)] = path.read_text(encoding="utf-8")
        return Sources(texts, frozenset(packages))

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Syntax trees by dotted name."""
        return {module: ast.parse(text) for module, text in self.texts.items()}

    @cached_property
    def lines(self) -> int:
        """How many there are, in all files."""
        return sum(len(text.splitlines()) for text in self.texts.values())

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The imports within the package, those in functions included; what is for type checkers alone is none."""
        return tuple(
            edge
            for module, tree in self.trees.items()
            for node, hidden in _imports(tree)
            for edge in self._edges(module, node, hidden)
        )

    def _edges(self, module: str, node: ast.Import | ast.ImportFrom, hidden: bool) -> Iterator[Edge]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in self.texts:
                    yield Edge(module, alias.name, (), hidden)
            return
        base = node.module or ""
        if node.level:
            up = module.split(".")[: None if module in self.packages else -1]
            up = up[: len(up) - node.level + 1]
            base = ".".join([*up, *([base] if base else [])])
        for alias in node.names:
            if f"{base}.{alias.name}" in self.texts:
                yield Edge(module, f"{base}.{alias.name}", (), hidden)
            elif base in self.texts:
                yield Edge(module, base, (alias.name,), hidden)

    def graph(self) -> dict[str, set[str]]:
        """Which files each file imports."""
        found: dict[str, set[str]] = {module: set() for module in self.texts}
        for edge in self.edges:
            if edge.to != edge.source:
                found[edge.source].add(edge.to)
        return found

    def uses_of_any(self) -> int:
        """How often ``Any`` stands in an annotation or elsewhere, imports aside."""
        return sum(isinstance(node, ast.Name) and node.id == "Any" for node in self._nodes())

    def reaches(self) -> list[str]:
        """Private attributes of others: ``x._name`` of a named ``x`` that is neither ``self`` nor ``cls``."""
        return [
            f"{ast.unparse(node.value)}.{node.attr}"
            for node in self._nodes()
            if isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and isinstance(node.value, ast.Name | ast.Attribute)
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        ]

    def _nodes(self) -> Iterator[ast.AST]:
        for tree in self.trees.values():
            yield from ast.walk(tree)


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


_NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def lines_of_code(text: str) -> int:
    """How many lines of a file have code: no blank ones, no comments, and no docstrings, of whatever these are."""
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and node.value.value is not ...
        ):
            said.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    coded: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            coded.update(range(token.start[0], token.end[0] + 1))
    return len(coded - said)


def _imports(node: ast.AST, hidden: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether each is in a function."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from _imports(child, hidden)
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, hidden
    inner = hidden or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, inner)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Files that import each other, directly or not: strongly connected components of more than one, largest first."""
    reached = {start: _reached(graph, start) for start in graph}
    found: list[list[str]] = []
    seen: set[str] = set()
    for start in graph:
        circle = sorted(other for other in reached[start] if start in reached[other])
        if start not in seen and len(circle) > 1:
            found.append(circle)
        seen.update(circle)
    return sorted(found, key=len, reverse=True)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        module = ahead.pop()
        if module not in found:
            found.add(module)
            ahead += graph[module]
    return found
