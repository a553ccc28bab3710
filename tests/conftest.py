"""Offline, seeded, and with a small dataset of real images made on the spot."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import torch

import gld_zoo  # noqa: F401  registers the models


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
