"""A process that measures what it is told to, a name in each line, and answers with a line of JSON for each."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
import warnings
from typing import Any

import torch

from benchmarks.supported import libraries

MEMORY = 14 << 30
"""How many bytes a worker may take."""


def main() -> None:
    """Answer until there is no more to read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print is not an answer
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*line.split())), file=answers, flush=True)
        gc.collect()  # a large model is few objects, which would wait for the next ones to be made


def answer(library: str, name: str) -> dict[str, Any]:
    """The row of a model."""
    start = time.perf_counter()
    row: dict[str, Any] = {"library": library, "name": name}
    try:
        row |= libraries.measured(library, name, row)
    except libraries.NotBuilt as reason:
        row["reason"] = str(reason)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {lines[0][:300]}"
        if "-v" in sys.argv:
            traceback.print_exc()
    return row | {"seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    main()
