"""The entry point of ``python -m rotormlx``."""

from rotormlx.cli.main import main

main()
