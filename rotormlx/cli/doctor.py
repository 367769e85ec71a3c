"""The command ``rotormlx doctor``: prints a table and one line of advice, and writes a file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from rotormlx.cli import outputs
from rotormlx.cli.refusal import Refusal, refusing, sentence
from rotormlx.cli.terminal import wide_console
from rotormlx.measure import doctor
from rotormlx.measure.doctor import Findings


def run(output: Path, *, timed: bool, runs: int) -> Findings:
    """Check the machine, print the result, and write it to a file.

    Args:
        output: The JSON file to write.
        timed: Whether to time attention.
        runs: Number of timed runs of each kernel.

    Returns:
        What was found.

    Raises:
        Refusal: If the requested backend cannot run here, or the file cannot be written.
    """
    console = wide_console()
    with console.status("starting") as status, refusing(RuntimeError, where=("[backend]",)):
        found = doctor.find_out(timed=timed, runs=runs, say=status.update)
    names, *rows = doctor.rows(found)
    table = Table(title=f"{found.machine}; MLX {found.versions['mlx']}")
    table.add_column(names[0])
    for name in names[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for operation, why in found.wrong.items():
        console.print(f"{operation}: {why}", highlight=False)
    for name, way in found.ways.items():
        console.print(f"fastest {name}: {way}", highlight=False)
    console.print(found.verdict, highlight=False)
    try:
        outputs.write_whole(output, json.dumps(found.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise Refusal(f"[doctor] {output} cannot be written: {sentence(error)}.") from error
    console.print(f"Written: {output}", highlight=False)
    return found
