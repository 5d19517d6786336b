"""`python -m sd3.probe`."""

import sys

from sd3.probe.command import main

sys.exit(main())
