"""`python -m pipeline.export`."""

import sys

from pipeline.export.command import main

sys.exit(main())
