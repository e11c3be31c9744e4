"""A recipe applied to a model folder. START HERE: `compress.py`."""
