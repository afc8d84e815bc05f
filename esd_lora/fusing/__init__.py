"""Stacks that leave the rest alone: the closed form, the distillation after it, and what it is all measured by."""
