"""Files: their locations, writing them, and the checks before one is read."""
