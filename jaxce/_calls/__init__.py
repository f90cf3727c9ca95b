"""From checked arguments to results, on any layout: of scores that are arrays, and of scores that are a projection."""
