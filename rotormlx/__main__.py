"""``python -m rotormlx``."""

from rotormlx.cli import main

main()
