"""Eraser files: tensors, header, stacks, manifests, and the Hub that they are fetched from."""
