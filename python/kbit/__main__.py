"""`python -m kbit`."""

import sys

from kbit.cli import main

sys.exit(main())
