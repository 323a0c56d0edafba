"""Scores -> advantages: by group, by segment, by critic."""
