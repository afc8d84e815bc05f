"""Baselines: other ways to keep a concept out of pictures, from the literature, that erasers are compared with."""
