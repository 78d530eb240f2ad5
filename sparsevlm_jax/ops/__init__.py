"""What layers are made of: attention, rotary embeddings, linear maps and norms."""
