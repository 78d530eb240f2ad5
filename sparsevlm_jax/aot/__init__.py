"""Programs compiled ahead of time for an accelerator that this machine does not have, and what they say about it."""
