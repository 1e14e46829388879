"""What a run keeps in its folder, and how it is found whole again."""
