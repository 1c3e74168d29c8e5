"""Each example runs as it stands, offline."""

import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("arguments", [["quickstart.py"]], ids=lambda arguments: arguments[0])
def test_example(arguments):
    result = subprocess.run([sys.executable, EXAMPLES / arguments[0], *arguments[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "budget 50%" in result.stdout


def test_every_example_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in table for path in EXAMPLES.glob("*.py"))
