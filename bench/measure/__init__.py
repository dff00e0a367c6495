"""Pure functions from a raw record to figures: definitions, success, statistics, verdict, comparison."""
