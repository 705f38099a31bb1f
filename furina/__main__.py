"""`python -m furina` is `furina`."""

import sys

from furina.cli import main

sys.exit(main())
