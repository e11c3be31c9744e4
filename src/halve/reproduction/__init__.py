"""Published tables made again with one command, their own way and the right way side by side.

START HERE: `system1.py`; what was published is data in `published.py`.
"""

from halve.reproduction.system1 import Study, reproduce_system1
from halve.reproduction.tables import tables

__all__ = ["Study", "reproduce_system1", "tables"]
