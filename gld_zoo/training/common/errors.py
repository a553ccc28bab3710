"""What can go wrong with a run, by whose doing; each message names the remedy."""

from __future__ import annotations


class TrainingError(Exception):
    """What was asked of the trainer cannot be done: commands end with its one line."""


class DataError(TrainingError, ValueError):
    """The dataset is not what the recipe says; the message names the place and the remedy."""


class ModelError(TrainingError, ValueError):
    """A model does not fit the recipe; the message names it and the remedy."""


class RunError(TrainingError, RuntimeError):
    """The run folder does not allow what was asked; the message names it and the remedy."""


class NonFiniteLossError(TrainingError, RuntimeError):
    """The loss is infinite or not a number; the message gives its terms and the step."""


class DiskError(TrainingError, RuntimeError):
    """Something could not be written or read; the message names it and the reason."""


class StoreError(TrainingError, ValueError):
    """A teacher's store is not what the recipe needs; the message names it and the remedy."""


class HeldError(RuntimeError):
    """Another process holds a lock; the message says which."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used, and the one before it is tried; the message says why."""
