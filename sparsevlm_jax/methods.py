"""What a pruning method of your own is made of; its home is `pruning.methods`, this is the name that is documented."""

from sparsevlm_jax.pruning.methods import METHODS, Layer, Method, Scores, sparsity

__all__ = ["METHODS", "Layer", "Method", "Scores", "sparsity"]
