"""Asynchronous jobs: submitted now, run when it is their turn, fetched later."""
