"""Files: their locations, how they are written, and the checks before one is read."""
