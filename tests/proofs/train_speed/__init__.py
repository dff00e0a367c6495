"""Training steps on a GPU, of this trainer and of its peers: `python -m tests.proofs.train_speed`."""
