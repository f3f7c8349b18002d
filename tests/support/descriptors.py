"""Files by their descriptors, and too few of these."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def few_descriptors(left: int) -> Iterator[None]:
    """Let this process open only so many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1 + left, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        taken = list(_all_there_are())
        for _ in range(left):
            os.close(taken.pop())
        for fd in taken:
            stack.callback(os.close, fd)
        yield


def _all_there_are() -> Iterator[int]:
    while True:
        try:
            yield os.open("/", os.O_PATH)
        except OSError as error:
            if error.errno == errno.EMFILE:
                return
            raise


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of one file."""
    return os.path.sameopenfile(one, other)
