"""A broker that kills itself, as `kill -9` would, at a point of its store:

python -m tests.support.dying_broker CONFIG (Store|Draft).METHOD (before|after)
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from gpumanager.asyncjobs.files import Draft
from gpumanager.asyncjobs.store import Store
from gpumanager.config import load_config
from gpumanager.serving import serve


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def main(config: str, point: str, when: str) -> int:
    owner, _, name = point.partition(".")
    of: Any = {"Store": Store, "Draft": Draft}[owner]
    as_it_is = getattr(of, name)

    def dying(*args: Any, **named: Any) -> Any:
        if when == "before":
            die()
        as_it_is(*args, **named)
        return die()

    setattr(of, name, dying)
    return serve(load_config(config))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
