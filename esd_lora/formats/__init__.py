"""Erasers for other programs and for people: written, read, looked into, and described in a model card."""
