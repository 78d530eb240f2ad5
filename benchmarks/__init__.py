"""XLA against PyTorch: what pruning gives on this machine, measured."""
