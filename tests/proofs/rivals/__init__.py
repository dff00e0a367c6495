"""The relay beside other gateways, over one scripted engine: `python -m tests.proofs.rivals`."""
