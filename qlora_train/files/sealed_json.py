"""JSON files that contain a hash of their values, so that damage is detected.

A flipped bit in a number is still JSON, and training would silently go on with a wrong step or loss scale.
The hash is of the values, independent of the text's layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

_SEAL = "xxh3_128"


def seal(values: Mapping[str, Any]) -> str:
    """The text of a sealed file."""
    plain = json.loads(json.dumps(values))  # as it will be read
    return json.dumps(plain | {_SEAL: _hash_of(plain)}, indent=1) + "\n"


def unseal(file: Path) -> dict[str, Any]:
    """The values of a sealed file. Raises ValueError where they are damaged, and OSError."""
    try:
        values = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict) or values.pop(_SEAL, None) != _hash_of(values):
        raise ValueError("it is not what was written: its hash differs")
    return values


def _hash_of(values: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest())
