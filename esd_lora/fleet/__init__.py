"""Many requests: the list of what is to be erased, and what became of each."""
