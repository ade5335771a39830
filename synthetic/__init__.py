"""A synthetic set on disk: written, read and exported here only."""
