"""Coverage-guided fuzzing of everything that reads a file, with atheris (libFuzzer).

    python -m tests.storage.fuzz_loader -max_total_time=60 NEW tests/storage/corpus

This runs for a minute; longer runs take ``-max_total_time=3600 -jobs=2``. NEW is a directory of
your own that keeps new inputs; what ``-merge=1`` leaves of it is worth keeping in the corpus.
Other options are libFuzzer's.

A finding (an exception that is not ours, a crash, more than 60 seconds or 2 GB) ends the run and is
left in the working directory.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rotormlx"]):
    from tests.support import fuzz_files

# Loaders of a few libraries are at work beside ours.
_MOST_MEGABYTES = 2048


def main() -> None:
    """Run libFuzzer with the arguments of the command line."""
    path = Path(tempfile.mkdtemp()) / "a.safetensors"

    def test_one_input(data: bytes) -> None:
        path.write_bytes(data)
        fuzz_files.load(fuzz_files.kind_of(data), path)

    def mutated(data: bytes, most_bytes: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, most_bytes))
        return fuzz_files.mutate(data, rng)[0][:most_bytes] if data else b"\2\0\0\0\0\0\0\0{}"

    options = ["-timeout=60", f"-rss_limit_mb={_MOST_MEGABYTES}", "-max_len=65536"]
    # Their own threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for kind in fuzz_files.MODELS:
        fuzz_files.model_of(kind)
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], test_one_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
