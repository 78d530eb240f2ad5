"""`sparsevlm explain`: what pruning kept, merged and dropped of an image, and why, as a page and an image."""
