"""`python -m tinygpt`: the command line."""

import sys

from tinygpt.cli import main

sys.exit(main())
