"""The page of ``app.py``: a drawn mask becomes an image."""
