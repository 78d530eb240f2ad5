<<<<<<< HEAD
"""What layers are made of: attention, rotary embeddings, linear maps and norms."""
=======
"""What the accelerator computes, whatever the model: attention, rotary positions, layers."""
>>>>>>> g1
