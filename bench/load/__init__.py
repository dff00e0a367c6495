"""Offering load: when requests are due, and the loop that sends them and keeps what comes back."""
