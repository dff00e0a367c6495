"""The gateway: relays (token path), control (everything else) and the command line."""

__version__ = "0.1.0"
