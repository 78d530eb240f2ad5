"""`sparsevlm explain`: what pruning kept, merged and dropped of a picture, and why, as a page and a picture."""
