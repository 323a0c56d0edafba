"""Training pairs from plain sentences: generate, rate, filter, and embed for the mask."""
