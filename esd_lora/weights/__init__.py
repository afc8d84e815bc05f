"""Base weights on disk: erasers merged into them, proved, and taken out of fine-tuned ones."""
