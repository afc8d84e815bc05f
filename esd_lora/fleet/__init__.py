"""The fleet: a list of requests is the input, a measured model the output."""
