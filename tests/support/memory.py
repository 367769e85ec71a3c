"""The most memory that this process has had."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Resident memory at its peak; on Linux not that of the process which started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
