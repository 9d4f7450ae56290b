"""`python -m pipeline.demo`."""

import sys

from pipeline.demo.command import main

sys.exit(main())
