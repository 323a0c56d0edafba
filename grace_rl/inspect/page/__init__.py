"""The local web page of `grace-rl inspect`."""
