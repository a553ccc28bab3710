"""What a model scores, what it draws, and what a dataset holds."""
