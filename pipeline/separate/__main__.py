"""`python -m pipeline.separate`."""

import sys

from pipeline.separate.command import main

sys.exit(main())
