"""Contracts for methods and adapters of other packages, on tiny random models."""
