"""The command line, ``tdhook`` (extra ``cli``: typer and rich)."""

from __future__ import annotations

import io
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows fewer letters is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        from tdhook.cli.commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.stderr.write(
            f'the command line needs {missing}, which is not installed: pip install "tdhook[rl,viz,cli]"\n'
        )
        raise SystemExit(2) from None
    app(prog_name="tdhook")
