"""`python -m grace_rl` is the command `grace-rl`."""

from grace_rl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
