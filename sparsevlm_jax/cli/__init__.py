"""The command `sparsevlm`: one small file per command."""
