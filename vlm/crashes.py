"""Named points at which a process can be made to die, which is how tests prove what a kill leaves behind.

``CRASH_AT=point`` or ``CRASH_AT=point:3`` in the environment kills the process at that point, or the third
time it is reached.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill this process without any clean-up if the environment asks for it here."""
    wanted, _, count = os.environ.get("CRASH_AT", "").partition(":")
    if wanted != name:
        return
    _reached[name] += 1
    if _reached[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
