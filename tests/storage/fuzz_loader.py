"""Coverage-guided fuzzing of everything that reads a file, with atheris (libFuzzer).

    python -m tests.storage.fuzz_loader -max_total_time=60 NEW tests/storage/corpus

This runs for a minute; longer runs take ``-max_total_time=3600 -jobs=2``. NEW is a directory of
your own that keeps new inputs; what ``-merge=1`` leaves of it is worth keeping in the corpus.
Other options are libFuzzer's.

A finding (an exception that is not ours, a crash, more than 60 seconds, or a peak of memory 1 GiB
above what the libraries and the models take) ends the run and is left in the working directory.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rotormlx"]):
    from tests.support import fuzz_files
from tests.support.memory import GrowthLimit

# Far above what the largest input takes, 64 KiB, and far below a size that a header may claim.
MOST_GROWN = 2**30


def main() -> None:
    """Run libFuzzer with the arguments of the command line."""
    path = Path(tempfile.mkdtemp()) / "a.safetensors"

    def test_one_input(data: bytes) -> None:
        path.write_bytes(data)
        fuzz_files.load(fuzz_files.kind_of(data), path)
        limit.check()

    def mutated(data: bytes, most_bytes: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, most_bytes))
        return fuzz_files.mutate(data, rng)[0][:most_bytes] if data else b"\2\0\0\0\0\0\0\0{}"

    # Their own threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for kind in fuzz_files.MODELS:
        fuzz_files.model_of(kind)
    fuzz_files.torch_model()
    limit = GrowthLimit(MOST_GROWN)
    # libFuzzer's own limit only stops what would fill the machine before the check: the peak that
    # it reads includes that of the process which started this one.
    most_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MOST_GROWN // 1024
    limits = ["-timeout=60", f"-rss_limit_mb={most_kilobytes // 1024}", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], test_one_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
