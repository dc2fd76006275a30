"""`python -m fastimagen` and `deepspeed --module fastimagen`: the `fastimagen` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
