"""A bound on what a process of its own may take, for work on files that strangers made."""

import contextlib


def bound_memory(num_bytes: int) -> None:
    """This process gets so many bytes more than it has, then MemoryError; and no dump of it is written. Does
    nothing where the system has no such bounds."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as file:
            bound = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
