"""Model folders: what is stored, read, checked and written."""
