"""The recipe's key `deepspeed`: DeepSpeed's own configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError


def deepspeed_config(given: Any) -> dict[str, Any]:
    """What `deepspeed` says, empty where it is not given.

    Args:
        given: A mapping, JSON text, or a JSON file; or nothing.

    Raises:
        UserError: It is no JSON object, or its section `zero_optimization` is none.

    >>> deepspeed_config('{"zero_optimization": {"stage": 2}}')["zero_optimization"]
    {'stage': 2}
    """
    if not given:
        return {}
    config, where = given, ""
    try:
        if not isinstance(given, dict):
            text = str(given)
            if not text.lstrip().startswith("{"):
                where, text = f"{given}: ", Path(text).read_text(encoding="utf-8")
            config = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed: {where}is not JSON that can be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {where}must be a JSON object, such as {{...}}")
    if not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"deepspeed: {where}zero_optimization must be an object with a stage")
    return config
