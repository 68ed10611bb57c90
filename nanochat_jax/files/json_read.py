"""JSON files from elsewhere."""

import json
from pathlib import Path

from nanochat_jax.files.plain_pickle import Refused, naming_file, short


def read_json_object(path: Path) -> dict:
    """What a JSON file holds. Refused: it is not JSON, not an object, or has a name twice.

    Of two values of one name, readers differ in which one they take."""
    with naming_file(path):
        try:
            content = json.loads(path.read_bytes(), object_pairs_hook=without_repeats)
        except Refused:
            raise
        except (ValueError, RecursionError) as e:
            raise Refused(f"it is not JSON ({e})") from None
        if not isinstance(content, dict):
            raise Refused(f"it must be an object, got {short(content)}")
        return content


def without_repeats(pairs: list[tuple]) -> dict:
    """The dict of a JSON object's names and values. Refused: one name is twice among them."""
    if len(found := dict(pairs)) != len(pairs):
        raise Refused("a name is twice in its JSON")
    return found
