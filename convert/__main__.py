"""`python -m convert ...` is `sparsevlm convert ...`."""

import sys

from sparsevlm_jax.cli import main

sys.argv[1:1] = ["convert"]
main()
