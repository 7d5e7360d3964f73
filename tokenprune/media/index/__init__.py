"""Packet indices: which frames a file holds and where, without decoding them."""
