"""What a pruning method of your own is made of; its home is `pruning.methods`, this is the name that is documented."""

from sparsevlm_jax.pruning.methods import METHODS, Method, PruningContext, Scores, sparsity

Layer = PruningContext  # its name in 0.1

__all__ = ["METHODS", "Layer", "Method", "PruningContext", "Scores", "sparsity"]
