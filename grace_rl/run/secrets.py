"""Secrets: what is one, and how it stays out of all that is written or printed.

A value is secret, whoever's argument it is (TRL's, transformers', a reward's, a judge's) and in the
environment,

- by name: a token, key, password, secret or credential (`hub_token`, `api_key`, `HF_TOKEN`);
- by type: pydantic's `SecretStr`, or whatever else has `get_secret_value`;
- by value: a text with a secret in it that this process has met, and a URL's `user:password@`.

A masked value is never compared: whoever resumes a run gives the secret again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MASK = "********"

_ALWAYS = {
    "apikey",
    "authorization",
    "cookie",
    "passphrase",
    "passwd",
    "password",
    "secret",
    "secrets",
}
_ALWAYS |= {"credential", "credentials"}
_KEYS = {"access", "account", "api", "encryption", "private", "secret", "signing"}  # before `key`
_TEXT = {"bos", "eos", "pad", "unk", "mask", "cls", "sep", "image", "audio", "video", "stop", "end"}
_TEXT |= {
    "start",
    "special",
    "think",
    "answer",
    "first",
    "last",
    "next",
    "new",
    "per",
    "max",
    "min",
}
_TEXT |= {"num", "space", "query", "document", "prompt"}
_NOT_ITSELF = {"env", "variable", "name", "file", "path"}  # where the secret is
_ADDRESS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST = 6  # characters; shorter values stand in too many innocent texts
_met: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a key, an argument or a variable of this name holds a secret.

    >>> [is_secret(n) for n in ("hub_token", "api_key", "HF_TOKEN", "judge.headers.Authorization")]
    [True, True, True, True]
    >>> [is_secret(n) for n in ("eos_token", "max_tokens", "api_key_env", "group_key", "keys")]
    [False, False, False, False, False]
    """
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", name.rpartition(".")[2])]
    last, before = (words or [""])[-1], (words[-2:-1] or [""])[0]
    if last in _NOT_ITSELF:
        return False
    if last == "token":
        return before not in _TEXT  # a piece of text has such a name too
    return bool(_ALWAYS & set(words)) or (last == "key" and before in _KEYS)


def masked(tree: Any, name: str = "") -> Any:
    """A copy of plain data with `MASK` in the place of each secret; the values are remembered.

    >>> masked({"hub_token": "hf_abc", "judge": {"api_key": None, "url": "http://me:pw@host/v1"}})
    {'hub_token': '********', 'judge': {'api_key': None, 'url': 'http://********@host/v1'}}
    """
    if hasattr(tree, "get_secret_value"):
        return masked(tree.get_secret_value(), "secret")
    if isinstance(tree, Mapping):
        # Below a secret name everything is secret: a mapping of credentials.
        inside = name if is_secret(name) else ""
        return {key: masked(value, inside or str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [masked(value, name) for value in tree]
    if tree is None or isinstance(tree, bool):
        return tree
    if is_secret(name):
        remember(str(tree))
        return MASK if str(tree) else tree
    return masked_text(tree) if isinstance(tree, str) else tree


def masked_text(text: str) -> str:
    """A text without the secrets that this process knows: those met and the environment's."""
    for secret in sorted(_met | set(_environment()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _ADDRESS.sub(MASK, text)


def masked_words(words: Sequence[str]) -> list[str]:
    """The words of a command line, `--hub_token x` and `--hub_token=x` masked.

    >>> masked_words(["train", "--hub_token", "hf_abc", "--judge.api_key=k", "--seed", "1"])
    ['train', '--hub_token', '********', '--judge.api_key=********', '--seed', '1']
    """
    kept: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        before = kept[-1] if kept else ""
        if before.startswith("--") and "=" not in before and is_secret(before):
            remember(word)
            kept.append(MASK)
        elif equals and flag.startswith("--") and is_secret(flag):
            remember(value)
            kept.append(f"{flag}={MASK}")
        else:
            kept.append(masked_text(word))
    return kept


def remember(secret: str) -> None:
    """Keep a value out of every text that is masked from now on."""
    if len(secret) >= _SHORTEST and secret != MASK:
        _met.add(secret)


def masked_keys(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in plain data where a secret was masked and must be given again.

    >>> list(masked_keys({"rewards": [{"name": "judge", "api_key": "********"}]}))
    [('rewards', 0, 'api_key')]
    """
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    elif isinstance(tree, str) and MASK in tree:
        yield prefix
    for key, value in items:
        yield from masked_keys(value, (*prefix, key))


def _environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret(name):
            yield value
