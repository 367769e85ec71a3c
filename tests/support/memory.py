"""The most memory that this process has had, and a limit on what a step may add to it."""

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


class GrowthLimit:
    """A limit on how much the peak grows from here on.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.start = peak_bytes()

    def check(self) -> None:
        """Raise a MemoryError once the peak has grown by more."""
        grown = peak_bytes() - self.start
        if grown > self.most:
            raise MemoryError(
                f"peak memory must grow by at most {self.most / 2**20:.0f} MiB over the "
                f"{self.start / 2**20:.0f} MiB at the start, but it grew by {grown / 2**20:.0f} MiB"
            )
