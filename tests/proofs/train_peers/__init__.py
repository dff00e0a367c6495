"""The trainer beside TRL and ms-swift on a CPU: `python -m tests.proofs.train_peers`."""
