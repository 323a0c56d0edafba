"""What `grace-rl rewards new` writes: a small working reward of each kind, and its test.

`MyReward` and `my_reward` are replaced by the names that the user chose.
"""
