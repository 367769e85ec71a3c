"""Files: where they lie, how they are written and what is checked before one is read."""
