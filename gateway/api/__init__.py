"""The HTTP routes that are not inference. Thin: each parses, calls the service, and shapes the answer."""
