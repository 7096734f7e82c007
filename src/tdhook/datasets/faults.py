"""Faults: errors that say which rows they are of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["rows_named"]

_KINDS = (IndexError, KeyError, NotImplementedError, TypeError, ValueError)


@contextmanager
def rows_named(begin: int, end: int, of: str = "") -> Iterator[None]:
    """Have errors begin with the rows at fault, as ``rows 16 to 31: ...``.

    Args:
        begin: the first row.
        end: the one after the last.
        of: what went wrong there, as ``"the reducer 'moments'"``.
    """
    try:
        yield
    except OSError:  # of the system, whichever rows there are
        raise
    except Exception as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        what = f"rows {begin} to {end - 1}: {of + ': ' if of else ''}{text or type(error).__name__}"
        raise _like(error, what) from error


def _like(error: Exception, text: str) -> Exception:
    """An error of the same kind with another text, or of the next kind above it that is built in."""
    kinds = (kind for kind in _KINDS if isinstance(error, kind))
    try:
        found: object = type(error)(text)
    except Exception:  # a class that takes other arguments
        found = None
    return found if isinstance(found, Exception) else next(kinds, RuntimeError)(text)
