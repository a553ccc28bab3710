"""The zoo's three families, as timm models, and what their weights are."""
