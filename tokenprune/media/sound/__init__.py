"""Audio tracks, and the features that models take of them."""
