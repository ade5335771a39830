"""Measures of a synthetic image set: does it follow its masks, beside the same measure on real images.

The measures are functions of arrays and folders; ``evaluate.py`` is their command line.
"""
