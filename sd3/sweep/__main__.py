"""`python -m sd3.sweep`."""

import sys

from sd3.sweep.command import main

sys.exit(main())
