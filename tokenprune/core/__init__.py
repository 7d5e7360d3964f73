"""What methods are written in: no model, no file, and of heavy packages torch alone."""
