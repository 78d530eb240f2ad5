"""Hugging Face PyTorch weights to orbax and back: streamed, verified, resumable."""
