"""Scores become advantages: by group, by segment, by critic."""
