"""Showing a run: live in the terminal, as tables, as one HTML page."""
