"""Attacks: can what was erased be brought back? Each is one more model to paint with, the erased one with an attacker's help.

An attack succeeds on a picture where the detectors still see the concept, so its success rate stands beside the rates of the
base and of the erased model, on the same prompts and seeds.
"""
