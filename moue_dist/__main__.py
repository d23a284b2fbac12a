"""`python -m moue_dist` is `moue`."""

from __future__ import annotations

import sys

from moue_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
