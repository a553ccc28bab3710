"""Models by name, ready to train or to teach."""
