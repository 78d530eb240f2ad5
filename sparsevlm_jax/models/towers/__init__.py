"""Vision towers: pixels to features, and to saliency where a tower has any."""
