"""Adapters as files: what an upload may hold, whether it fits the base, where it lies. No HTTP, no database."""
