"""The nine contracts of the engine, over every method and every family."""
