"""`python -m harmonium` is the command `harmonium`."""

import sys

from harmonium.cli import main

sys.exit(main())
