"""GLD for any timm model: local logits, relation, loss, and the task for timm's training script."""
