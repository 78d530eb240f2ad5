"""`python -m convert`: conversion from a checkout. The code is `sparsevlm_jax.checkpoints`."""
