"""Examine which models of an installed library rotormlx compresses, and write a table of them.

    python scripts/coverage.py mlx-lm           # docs/COVERAGE.md, a few minutes
    python scripts/coverage.py mlx-vlm          # docs/COVERAGE_VLM.md
    python scripts/coverage.py transformers     # docs/COVERAGE_TORCH.md
    python scripts/coverage.py mlx-lm llama gemma3_text     # only these, without writing

Every model type gets a tiny configuration (tests/support) and random weights. The same tokens are
read with the library's own caches and with compressed ones: a prefill, a chunk and single steps,
most of which read packed bytes. For models with a router, the comparison ends at the first token
with other experts: there the codec's error decides between nearly equal experts, and from then on
the two runs compute with different weights.

Models are examined one after another in a separate process. If a model ends that process, its row
in the table says so, and a new process examines the rest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.coverage_table import STEPS, Result, table

# Module and class of each library; only the library in use must be installed.
HOSTS = {
    "mlx-lm": ("scripts.coverage_mlx", "MlxLm"),
    "mlx-vlm": ("scripts.coverage_vlm", "MlxVlm"),
    "transformers": ("scripts.coverage_torch", "Transformers"),
}
# The slowest model takes half a minute on a busy core.
LONGEST_SECONDS = 600.0


class Host(Protocol):
    """The interface that this script needs of a library.

    Args:
        path: File of the table.
        head: Text before the table, as ``coverage_table.table`` takes it.
        version: Version of the installed library.
    """

    path: Path
    head: str
    version: str

    def prepare_process(self) -> None:
        """Set up a process that only examines models."""

    def model_types(self) -> list[str]:
        """Return every model type of the library."""

    def examine(self, model_type: str, steps: Sequence[int] = STEPS) -> Result:
        """Compare a model's logits with and without compression, over tokens in these chunks."""


def host(module: str, class_name: str) -> Host:
    """Return the library of an entry of ``HOSTS``."""
    made: Host = getattr(importlib.import_module(module), class_name)()
    return made


def examined(name: str, model_types: Sequence[str]) -> Iterator[Result]:
    """Examine models one after another, and go on if one ends its process.

    Args:
        name: Name of the library, a key of ``HOSTS``.
        model_types: Model types, in the order to examine them.

    Yields:
        The result of each model type as soon as it is known.
    """
    left = list(model_types)
    context = multiprocessing.get_context("spawn")
    while left:
        results, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_examine_all, args=(HOSTS[name], left, sender), daemon=True
        )
        process.start()
        sender.close()
        alive = True
        try:
            while left and alive:
                result, alive = _next(left.pop(0), results, process)
                yield result
        finally:
            process.kill()
            process.join()


def _examine_all(place: tuple[str, str], model_types: list[str], results: Connection) -> None:
    library = host(*place)
    library.prepare_process()
    for model_type in model_types:
        results.send(library.examine(model_type))


def _next(model_type: str, results: Connection, process: BaseProcess) -> tuple[Result, bool]:
    """Return the result of this model type, and whether the process is still alive."""
    end = f"no result within {LONGEST_SECONDS:.0f} s"
    try:
        if results.poll(LONGEST_SECONDS):
            return results.recv(), True
    except EOFError:
        process.join()
        end = f"it ended its process, exit status {process.exitcode}"
    return Result(model_type, "crashes", end), False


class Kept:
    """Results in a file, one line of JSON each, so that an interrupted run can continue.

    Args:
        path: The file; None to keep nothing.
        facts: The library and its version; results with other facts are ignored.
    """

    def __init__(self, path: Path | None, **facts: str) -> None:
        self._path = path
        self._facts = facts
        self.known: dict[str, Result] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                kept = json.loads(line)
                if kept["of"] == facts:
                    result = Result(**kept["result"])
                    self.known[result.model_type] = result

    def keep(self, result: Result) -> None:
        """Add a result."""
        self.known[result.model_type] = result
        if self._path is not None:
            line = json.dumps({"of": self._facts, "result": asdict(result)})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def main() -> int:
    """Examine models, and return exit status 1 if one crashes or differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("model_types", nargs="*", help="model types; all by default")
    parser.add_argument(
        "--keep", type=Path, help="file that keeps each result; models in it are not run again"
    )
    given = parser.parse_args()
    library = host(*HOSTS[given.host])
    chosen = given.model_types or library.model_types()
    kept = Kept(given.keep, host=given.host, version=library.version)
    for result in examined(given.host, [t for t in chosen if t not in kept.known]):
        kept.keep(result)
        print(result, file=sys.stderr, flush=True)
    results = [kept.known[model_type] for model_type in chosen]
    text = table(library.head, results, library.version)
    if not given.model_types:
        library.path.write_text(text, encoding="utf-8")
    print(text.partition("\n\n| ")[0].splitlines()[-1])
    return int(any(r.verdict in ("crashes", "differs") for r in results))


if __name__ == "__main__":
    sys.exit(main())
