"""The command line. Exit codes: 0 done, 1 failed while running or said no, 2 bad config or usage;
those of `result` say more.

Each module is a group of commands; what only some of them need is imported when they run, so that
`serve` starts fast.
"""

from gpumanager.cli.group import main

from gpumanager.cli import connect, doctor, jobs, operating, serving, setup  # isort: skip
from gpumanager.cli import simulating, submitting, watching  # isort: skip

__all__ = [
    "connect",
    "doctor",
    "jobs",
    "main",
    "operating",
    "serving",
    "setup",
    "simulating",
    "submitting",
    "watching",
]
