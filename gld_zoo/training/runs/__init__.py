"""A run's folder and what is kept there."""
