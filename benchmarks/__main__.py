"""`python -m benchmarks ...` is `sparsevlm bench ...`."""

import sys

from sparsevlm_jax.cli.main import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
