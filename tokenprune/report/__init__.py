"""What pruning did: counts, seconds, bytes, pictures."""
