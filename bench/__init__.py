"""Tunegate's bench: a load benchmark for OpenAI-compatible servers. It imports nothing of the gateway's."""

__version__ = "0.1.0"
