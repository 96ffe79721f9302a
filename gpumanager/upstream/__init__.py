"""Talking to the consumers: the proxied jobs, and the calls that probe, load and unload."""
