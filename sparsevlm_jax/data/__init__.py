"""The model inside the package, and its pictures."""
