"""A reward for rationales in short, plain words."""
