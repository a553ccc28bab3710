"""What people start: one file a command, with its options and what it prints."""
