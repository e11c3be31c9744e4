"""The smallest (or fastest) model whose accuracy or KL divergence keeps a limit. START HERE: `search.py`."""
