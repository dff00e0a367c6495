"""What is asked of the server: prompts, lengths, models and turns, all from seeds."""
