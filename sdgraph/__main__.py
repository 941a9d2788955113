"""sdgraph's command line; `python -m sdgraph` is the same. See `sdgraph.cli`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
