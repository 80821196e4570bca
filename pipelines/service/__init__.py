"""The HTTP service: what it lets in, in which order it answers, and what it keeps of it."""
