# SPDX-License-Identifier: Apache-2.0
"""
Writes docs/cli.md from the parsers of the command line.

    python docs/make_cli.py            # `make docs` does it; tests/test_docs.py fails where the page is not what this writes
"""

import contextlib
import io
import os
from pathlib import Path

from dynamoe_hf import cli


PAGE = Path(__file__).parent / "cli.md"
COLUMNS = 100  # of the help texts
HEAD = """\
<!-- Written by docs/make_cli.py. Change the docstrings in dynamoe_hf/arguments.py instead. -->
# Command line

`dynamoe STAGE --help` prints what stands here. The flags of a stage are the fields of its arguments in
[Python](api.md#arguments-of-the-stages), with the same defaults. Every stage reads a model folder, and those that make a
new one write it whole or not at all. Wrong input is told in one line on stderr: exit code 1 for a wrong value or file, 2
for a wrong flag.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD, f"## dynamoe\n\n{fenced(help_of())}"]
    sections += [f"## dynamoe {name}\n\n{fenced(help_of(name))}" for name in cli.STAGES]
    return "\n".join(sections)


def help_of(*stage: str) -> str:
    """What `dynamoe --help` or `dynamoe STAGE --help` prints."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(COLUMNS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.main([*stage, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
