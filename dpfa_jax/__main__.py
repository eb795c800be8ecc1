"""`python -m dpfa_jax`: the command line of `dpfa_jax.cli`."""

import sys

from dpfa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
