"""``python -m fvgen.cli``."""

import sys

from fvgen.cli import main

sys.exit(main())
