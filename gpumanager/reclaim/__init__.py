"""Taking the card's memory back from a process that does not give it, and bringing it back."""
