"""Make the tables, the map and the help in README.md and docs/*.md.

python -m tools.docs            rewrite them
python -m tools.docs --check    change nothing; exit with 1 when a page is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halve.errors import HalveError
from tools.docs.pages import ROOT, update


def main() -> int:
    """The program; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a page is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    arguments = parser.parse_args()
    try:
        stale = update(arguments.root, arguments.check)
    except HalveError as error:
        print(error, file=sys.stderr)
        return 2
    for page in stale:
        print(f"{page.relative_to(arguments.root)}: {'stale, run make docs' if arguments.check else 'rewritten'}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
