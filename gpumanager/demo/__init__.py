"""A complete, working example: the broker in front of a real speech service, without a GPU."""
