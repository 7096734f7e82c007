"""What a mistake of the user looks like: one line that says what to do, and exit code 2."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from tdhook.markup import visible

__all__ = ["notes", "require", "require_one_way", "user_errors"]

_EXPECTED = (ValueError, TypeError, KeyError, IndexError, OSError, ImportError, NotImplementedError)
_TRACEBACK = "TDHOOK_TRACEBACK"


@contextmanager
def user_errors() -> Iterator[None]:
    """Print the errors that wrong input causes in one line; with ``TDHOOK_TRACEBACK`` set, let them through."""
    try:
        yield
    except _EXPECTED as error:
        ours = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "tdhook"
        if ours or os.environ.get(_TRACEBACK):
            raise
        # str() of a KeyError is the repr of its text.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        _print(("error: ", "bold red"), text or type(error).__name__)
        raise typer.Exit(2) from None


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings as notes, each of them once, at the end of the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        finally:
            _print_notes(caught)


def _print_notes(caught: list[warnings.WarningMessage]) -> None:
    for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        _print(("note: ", "bold yellow"), text)


def require(*packages: str) -> None:
    """Make sure that optional packages are there before any work is done.

    Raises:
        ImportError: one of them is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f'this command needs {" and ".join(missing)}, which {are} not installed: pip install "tdhook[rl,viz,cli]"'
        )


def require_one_way(context: typer.Context, method: str | None) -> None:
    """Make sure that nobody names rules beside another method, be they those that are the default.

    Raises:
        ValueError: somebody does.
    """
    source = context.get_parameter_source("composite")
    if method is not None and source is not None and source.name != "DEFAULT":
        raise ValueError("--composite is one of LRP, and --method another way to explain: give one of them")


def _print(label: tuple[str, str], text: str) -> None:
    Console(stderr=True).print(Text.assemble(label, visible(" ".join(text.split()))), soft_wrap=True)
