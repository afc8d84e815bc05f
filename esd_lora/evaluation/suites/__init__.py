"""Suites: YAML files that say which prompts are painted and who scores the pictures, and their readers."""
