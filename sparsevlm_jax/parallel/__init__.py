"""One model over several devices: how they are arranged, where parameters lie, and what programs keep where."""
