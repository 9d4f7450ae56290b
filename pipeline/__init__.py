"""The pipeline; importing any of it in an environment without its packages is one line that says what to do."""

import sys
from importlib.util import find_spec

if find_spec("torch") is None or find_spec("pydantic") is None:
    sys.exit(
        f"error: {sys.executable} has not the packages of this project: `. .venv/bin/activate` first, which "
        "`make repro` sets up"
    )
