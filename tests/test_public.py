"""The public surface is small, listed, and does not depend on what was imported before."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import halve


def test_every_public_name_resolves_to_what_it_names() -> None:
    for name in halve.__all__:
        assert getattr(halve, name) is not None
    assert set(halve._PUBLIC) | {"__version__"} == set(halve.__all__)


def test_no_public_name_is_also_a_module() -> None:
    """`halve.compress` would turn from function into module as soon as somebody imported the latter."""
    modules = {m.name for m in pkgutil.iter_modules(halve.__path__)}
    assert not modules & set(halve.__all__)


def test_import_is_light() -> None:
    code = "import halve, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
