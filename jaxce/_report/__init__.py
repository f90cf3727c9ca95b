"""The report of `python -m jaxce`: nothing of the package imports it."""
