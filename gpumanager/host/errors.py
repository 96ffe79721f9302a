"""What goes wrong in this room."""


class ReclaimFailed(Exception):
    """A consumer could not be stopped, or not be brought back; the text says why."""
