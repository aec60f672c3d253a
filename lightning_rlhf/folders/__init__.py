"""Folders that a path names, looked into before anything in them is loaded."""
