"""Questions and images into ids and pixels, on the host: NumPy and Pillow, no jax."""
