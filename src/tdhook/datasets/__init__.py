"""Whole data sets: a replay buffer, a training run, explained by as many processes as there are."""

from __future__ import annotations

from tdhook.datasets.gathering import gather
from tdhook.datasets.job import Job
from tdhook.datasets.keeping import Kept
from tdhook.datasets.launching import launch
from tdhook.datasets.over_time import OverTime
from tdhook.datasets.reducers import Histogram, Moments, Reservoir, TopRows
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.result import Result, open_result
from tdhook.datasets.rows import Rows, Saved
from tdhook.datasets.unit_rows import UnitRows
from tdhook.datasets.units import Place

__all__ = [
    "Histogram",
    "Job",
    "Kept",
    "Moments",
    "OverTime",
    "Place",
    "Reducer",
    "Reservoir",
    "Result",
    "Rows",
    "Saved",
    "TopRows",
    "UnitRows",
    "gather",
    "launch",
    "open_result",
]
