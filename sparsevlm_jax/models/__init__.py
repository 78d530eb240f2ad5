"""Pixels and ids to logits: towers, the decoder run stage by stage, and the families made of them."""
