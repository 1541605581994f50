"""The deliberate faults of `tests/mutations.toml` still apply to the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tests/mutations.py reads TOML with Python 3.11's tomllib")
def test_every_mutant_applies() -> None:
    script = Path(__file__).with_name("mutations.py")
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
