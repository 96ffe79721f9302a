"""Finding what runs on this machine, and writing a config and a service for it."""

DEMO_ROOT = "gpumanager's demo: "
"""What the demo's speech service answers to `GET /` begins with, so that it is told from a server
of the user's."""
