"""The public functions, a file a family: signatures, documentation, and a line of work."""
