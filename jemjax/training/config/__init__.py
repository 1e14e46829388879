"""What a run does: options, what is chosen where they are left open, and TOML."""
