"""Load the modules of a program that is starting."""

import gc
from importlib import import_module
from types import ModuleType


def load(module: str) -> ModuleType:
    """Import a module without garbage collections, which would be a third of a program's start.

    Imports make hardly any garbage. What they have made stays for good, so later collections leave
    it out.
    """
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.enable()
