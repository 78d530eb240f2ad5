"""Host side: images and questions to arrays; NumPy only."""
