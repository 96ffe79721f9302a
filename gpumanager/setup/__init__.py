"""Finding what runs on this machine, and writing a config and a service for it."""
