"""Starting a run on many processes, and looking before it starts whether it will fit."""
