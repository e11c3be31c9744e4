"""The smallest (or fastest) model whose accuracy stays above a floor. START HERE: `search.py`."""
