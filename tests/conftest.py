"""Settings for all tests."""

from __future__ import annotations

import torch
from transformers.utils import logging

torch.set_num_threads(1)  # tiny models only lose by sharing their work
logging.disable_progress_bar()
