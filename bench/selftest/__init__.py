"""What this client can do on this machine, measured against a source of its own whose timeline is known."""
