"""LoRA files of other programs: written, read, and looked into."""
