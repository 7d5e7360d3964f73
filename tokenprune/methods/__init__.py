"""Pruning methods: one published method per file, and the selectors they share."""
