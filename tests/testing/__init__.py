"""Tests of what other packages test themselves with."""
