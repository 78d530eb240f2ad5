"""`python -m benchmarks ...` is `sparsevlm bench ...`."""

import sys

from sparsevlm_jax.cli import main

sys.argv[1:1] = ["bench"]
main()
