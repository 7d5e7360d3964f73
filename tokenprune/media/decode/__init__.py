"""Frames from packets: a plan by GOPs, demuxing, decoding in workers, rows in order."""
