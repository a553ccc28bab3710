"""How anything is trained: the loop, its optimiser, its interruptions, and the launch."""
