"""Parts of the network that SiT does not have; ``models.py`` puts them into SiT."""
