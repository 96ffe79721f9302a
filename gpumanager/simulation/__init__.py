"""A card that exists only in a file, for the demo, for tests and for machines without a GPU."""
