"""Looking at the card and the consumers from the side, without touching a job."""
