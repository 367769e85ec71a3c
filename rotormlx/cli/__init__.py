"""The command ``rotormlx``."""
