"""Evaluation: is the concept gone, what else did it cost, and can it be brought back?"""
