"""Of each consumer: its state, what was learned of it, and whether it takes jobs."""
