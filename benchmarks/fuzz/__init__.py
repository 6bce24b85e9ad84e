"""Broken files, fed to everything that reads what people hand in."""
