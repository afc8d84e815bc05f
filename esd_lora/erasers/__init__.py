"""Eraser files: tensors, header, stacks, manifests, cards, and where they are fetched from."""
