"""What a report says of the machine that it was made on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import tdhook
from benchmarks.contenders import is_gpu
from benchmarks.work import machine_rates

__all__ = ["machine"]


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, versions, the date, how busy it is, and how fast ``device`` is."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tdhook": tdhook.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if not is_gpu(device):
        return found | {"rates": machine_rates(device, 2048)}
    return found | {"gpu": torch.cuda.get_device_name(), "rates": machine_rates(device, 8192)}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
