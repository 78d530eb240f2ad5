"""The model inside the package, and its images."""
