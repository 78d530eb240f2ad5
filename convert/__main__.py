"""`python -m convert ...` is `sparsevlm convert ...`."""

import sys

from sparsevlm_jax.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
