"""Who stays in the card's memory: the census, who leaves, and the proof that the memory is free."""
