"""One page of an explained rollout that a browser opens by itself: no server, no network, no library.

:func:`write_report` makes it; ``tdhook report FOLDER`` makes it of what ``tdhook demo`` and ``tdhook explain`` wrote.
"""

from tdhook.pages.writing import write_report

__all__ = ["write_report"]
