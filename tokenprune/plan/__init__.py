"""What a recipe will leave of a file, before any weights are loaded."""
