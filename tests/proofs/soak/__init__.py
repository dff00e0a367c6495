"""Hours of everything going wrong, in minutes: `python -m tests.proofs.soak --minutes 30`."""
