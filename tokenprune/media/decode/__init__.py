"""Frames from packets: intervals, demuxing, decoding in workers, rows in order."""
