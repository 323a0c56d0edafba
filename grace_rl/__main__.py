"""`python -m grace_rl` is the command `grace-rl`."""

import os
import sys

# Python looks in the working directory first: a user's trl.py there would hide TRL. It comes last.
if sys.path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))

from grace_rl.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
