"""One rank of a job: `python -m rft.cluster.rank MODULE ...` runs `MODULE.main` with everything it prints in a file of its own.

The file is rank-K.log in the folder $RFT_LOGS. What is printed before goes to the log of the node.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Returns the module's exit code."""
    log = Path(os.environ["RFT_LOGS"]) / f"rank-{os.environ.get('RANK', '0')}.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # the descriptors, so that libraries and child processes write there as well
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return importlib.import_module(argv[0]).main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
