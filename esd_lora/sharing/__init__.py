"""Erasers on the Hugging Face Hub and on this machine: pushed, pulled, searched, listed."""
