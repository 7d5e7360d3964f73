"""Watch a video once, in groups of frames, and ask many questions about it."""
