"""The routing policies compared on simulated engines: `python -m tests.proofs.routing`."""
