"""Which models of an installed library rotormlx compresses; writes a table for each library.

    python scripts/coverage.py mlx-lm           # docs/COVERAGE.md, a few minutes
    python scripts/coverage.py mlx-vlm          # docs/COVERAGE_VLM.md
    python scripts/coverage.py transformers     # docs/COVERAGE_TORCH.md
    python scripts/coverage.py mlx-lm llama gemma3_text     # these only, without writing

Every model type gets a tiny configuration (tests/support) and random weights. The same tokens go
through the library's own caches and through compressed ones: a prefill, a chunk and single steps,
most of them reading packed bytes. Where experts are chosen by a router, the first token whose
choice differs is noted: the codec's error decides between nearly equal experts there, and from
then on the two runs are of different models.

Models are examined one after another in a process of their own. A model that ends this process
gets its line in the table, and the next ones a new process.
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

# Where the class of each library is; only the library that is asked for must be installed.
HOSTS = {
    "mlx-lm": ("scripts.coverage_mlx", "MlxLm"),
    "mlx-vlm": ("scripts.coverage_vlm", "MlxVlm"),
    "transformers": ("scripts.coverage_torch", "Transformers"),
}
# The slowest model takes half a minute on a busy core.
LONGEST_SECONDS = 600.0


class Host(Protocol):
    """What this script asks of a library.

    Args:
        path: Its table.
        head: What stands before the table, as ``coverage_table.table`` takes it.
        version: Of the installed library.
    """

    path: Path
    head: str
    version: str

    def prepare_process(self) -> None:
        """Set up a process that does nothing but examine models."""

    def model_types(self) -> list[str]:
        """Every model type of the library."""

    def examine(self, model_type: str, steps: Sequence[int] = STEPS) -> Result:
        """Compare a model's logits with and without compression, over tokens in these chunks."""


def host(module: str, class_name: str) -> Host:
    """A library, given what ``HOSTS`` says of it."""
    made: Host = getattr(importlib.import_module(module), class_name)()
    return made


def examined(name: str, model_types: Sequence[str]) -> Iterator[Result]:
    """Examine models one after another, and outlive those that end their process.

    Args:
        name: Of the library, a key of ``HOSTS``.
        model_types: In this order.

    Yields:
        A result for each, as it comes.
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
    """The next result, of this model type, and whether the process can give more."""
    end = f"no result within {LONGEST_SECONDS:.0f} s"
    try:
        if results.poll(LONGEST_SECONDS):
            return results.recv(), True
    except EOFError:
        process.join()
        end = f"it ended its process, exit status {process.exitcode}"
    return Result(model_type, "crashes", end), False


class Kept:
    """Results in a file, a line of JSON each, so that a cut run can go on.

    Args:
        path: The file; None to keep nothing.
        facts: The library and its version; results of others are not known here.
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
    """Examine models; the exit status tells whether one crashes or differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("model_types", nargs="*", help="all by default")
    parser.add_argument(
        "--keep", type=Path, help="a file for results as they come; what it holds is not run again"
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
