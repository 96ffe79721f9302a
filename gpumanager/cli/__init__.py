"""The command line. Exit codes: 0 done, 1 failed while running or said no, 2 bad config or usage.

Each module is a group of commands; what only some of them need is imported when they run, so that
`serve` starts fast.
"""

from gpumanager.cli.group import main

from gpumanager.cli import connect, doctor, operating, serving, setup, simulating, watching  # isort: skip

__all__ = [
    "connect",
    "doctor",
    "main",
    "operating",
    "serving",
    "setup",
    "simulating",
    "watching",
]
