"""Inspection of folders before anything in them is loaded, and atomic writes."""
