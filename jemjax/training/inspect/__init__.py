"""What a run sees and does, looked at by people."""
