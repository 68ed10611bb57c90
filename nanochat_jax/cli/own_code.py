"""A user's own code, named on the command line as module:Class."""

import importlib
import inspect
import os
import sys
from typing import Any


def load_object(spec: str, flag: str) -> Any:
    """The object that `module:Class` names, made without arguments; modules of the current directory count.

    flag is what the user typed it after. Class may also be a function that makes the object, or the object itself.
    ValueError, one sentence, where this does not work.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{flag} must be module:Class, got {spec!r}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()  # the module may be younger than the last look into its folder
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # whatever a user's module does when it runs
        raise ValueError(f"{flag} {spec}: cannot import {module_name}: {type(e).__name__}: {e}") from e
    if not hasattr(module, attribute):
        raise ValueError(f"{flag} {spec}: {module.__file__ or module_name} has no {attribute}")
    made = getattr(module, attribute)
    if inspect.isclass(made) or inspect.isroutine(made):
        try:
            made = made()
        except (Exception, SystemExit) as e:
            raise ValueError(f"{flag} {spec}: {attribute}() failed, {type(e).__name__}: {e}") from e
    return made
