"""OpenAI's files, fine-tuning jobs and batches. Runs in the control process; the trainer is a process of its own."""
