"""Small programs that show how to use what the other tools write."""
