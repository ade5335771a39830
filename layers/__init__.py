"""Layers of the network; ``models.py`` puts them together."""
