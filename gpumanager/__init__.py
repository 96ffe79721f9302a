"""gpumanager: one URL, one queue and one lock in front of the AI services that share a GPU."""

__version__ = "0.1.0"
