"""Annotations of other programs to label images: one small file per format, cells put together in one place."""
