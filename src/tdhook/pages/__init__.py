"""One page of an explained rollout that a browser opens by itself: no server, no network, no library.

:func:`write_report` makes it; ``tdhook report FOLDER`` makes it of what ``tdhook demo`` and ``tdhook explain`` wrote.
:func:`write_dataset_report` and ``tdhook dataset report FOLDER`` make that of a whole data set;
:func:`write_concepts_report` and ``tdhook concepts`` that of the units of a layer.
"""

from tdhook.pages.concepts import UnitShown, write_concepts_report
from tdhook.pages.dataset import write_dataset_report
from tdhook.pages.writing import write_report

__all__ = ["UnitShown", "write_concepts_report", "write_dataset_report", "write_report"]
