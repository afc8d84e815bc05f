"""Detectors score pictures, one by one (`detector.Detector`) or as a whole (`frechet`).

A number is only as good as what counted it, so every detector records which package, version, weights and threshold it has.
One whose package or weights are not there is "not run", with the reason: a metric that was not measured is never 0.
"""
