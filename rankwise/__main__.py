"""`python -m rankwise`: the `rankwise` command."""

import sys

from rankwise.cli import main

if __name__ == "__main__":
    sys.exit(main())
