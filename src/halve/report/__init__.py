"""One self-contained HTML page about everything in a folder. START HERE: `page.py`."""
