"""`sparsevlm bench`: JAX against PyTorch on this machine, with answers that have to agree."""
