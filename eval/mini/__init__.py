"""The mini models: a generated world, the models that answer questions on it, their training."""
