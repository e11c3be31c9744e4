"""The first system's published tables made again. START HERE: `reproduce.py`; what was published is data in `published.py`."""
