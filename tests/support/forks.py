"""What a child of this process sees."""

import os
from collections.abc import Callable


def in_child(check: Callable[[], bool]) -> bool:
    """Whether a check holds in a child made by fork, which ends with it and runs nothing else."""
    child = os.fork()
    if child == 0:
        held = False
        try:
            held = check()
        finally:
            os._exit(0 if held else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refused_with(error: type[Exception], action: Callable[[], object]) -> bool:
    """Whether an action raises an error of just this class."""
    try:
        action()
    except error as caught:
        return type(caught) is error
    return False
