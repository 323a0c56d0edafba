"""The rewards that ship with grace-rl, one per file, written like anybody's plugin.

They import `grace_rl.reward` only, and are found through the entry-point group `grace_rl.rewards`.
"""
