"""The `halve` command: parse, call one function, print. START HERE: `app.py`."""
