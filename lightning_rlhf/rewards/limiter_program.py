"""Program that limits its own process and then becomes another program.

It imports nothing of this library, so that it starts fast. A function of the parent between fork and exec could not do
it: the parent has threads.
"""

from __future__ import annotations

import json
import os
import resource
import sys


def main(limits: dict[str, int], command: list[str]) -> None:
    """Set the limits of this process and become the command.

    Args:
        limits: by name of the resource: bytes, seconds, or a number of processes.
        command: full path of a program with its arguments.
    """
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError) as error:
            sys.exit(f"the limit {name} can't be set: {error}")
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} does not start: {error}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
