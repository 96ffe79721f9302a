"""Run a server that takes memory of a simulated card for as long as it runs.

`python -m tests.support.on_card CARD NAME MIB COMMAND…` becomes COMMAND, which holds the memory
then; where the card has not so much left, it ends with 3.
"""

from __future__ import annotations

import os
import sys

from gpumanager.gpu.simulated import OutOfMemory, SimulatedCard


def main() -> None:
    card, name, mib, *command = sys.argv[1:]
    try:
        SimulatedCard(card).allocate(name, int(mib))
    except OutOfMemory as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(3)
    os.execv(command[0], command)  # noqa: S606  # the same process, so the card goes on knowing it


if __name__ == "__main__":
    main()
