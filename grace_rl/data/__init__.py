"""Rows of text: reading them, making them, and turning them into the rollouts of a batch."""
