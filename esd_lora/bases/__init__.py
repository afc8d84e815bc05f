"""Base models: in memory, on disk, and those that ship inside."""
