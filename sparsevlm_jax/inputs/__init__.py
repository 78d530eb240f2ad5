<<<<<<< HEAD
"""Host side: images and questions to arrays; NumPy only."""
=======
"""Questions and pictures into ids and pixels, on the host: NumPy and Pillow, no jax."""
>>>>>>> g1
