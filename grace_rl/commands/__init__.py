"""The verbs of the command line, a module each; `grace_rl.cli` says what such a module has."""
