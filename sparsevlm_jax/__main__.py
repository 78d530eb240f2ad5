"""`python -m sparsevlm_jax` is the command `sparsevlm`."""

from __future__ import annotations

from sparsevlm_jax.cli.main import main

if __name__ == "__main__":
    main()
