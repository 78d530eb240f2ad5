"""The retention study: how many answers survive pruning, and what has to be kept for that."""
