"""A run's teacher: its head, and its answers, of which each is asked for once and kept."""
