"""`python -m seal_jax.commands` is `seal-jax`."""

import sys

from seal_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
