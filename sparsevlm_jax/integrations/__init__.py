"""Other people's programs that ask models; each file here is imported by its program alone."""
