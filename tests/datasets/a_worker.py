"""``python a_worker.py FOLDER`` works on the small job, alone or as a launcher says."""

from __future__ import annotations

import sys

from a_job import a_job
from torch import distributed

if __name__ == "__main__":
    status = a_job(sys.argv[1]).work()
    group = distributed.is_available() and distributed.is_initialized()
    sys.stdout.write(f"{status.chunks_done} of {status.chunks}, process group: {group}\n")
