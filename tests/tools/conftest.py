"""Tools import the modules beside them by name, as scripts do."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / f"tools/{folder}") for folder in ("bench", "check", "predict")]
