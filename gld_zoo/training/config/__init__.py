"""The options of a run, and the recipes that set them."""
