"""The card: what it has, who holds how much of it, and what was held before."""
