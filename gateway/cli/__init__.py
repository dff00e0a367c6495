"""The `gateway` command: one file a command group, flags generated from the configuration model."""
