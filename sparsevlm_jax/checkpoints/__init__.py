"""Weights in files: found, read, converted, checked and written."""
