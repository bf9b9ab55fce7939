"""Messages of the libraries that say nothing to a user of these scripts, silenced by name.

Each entry is one logger and a part of one message, with the reason; whatever else the
libraries have to say is still shown.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch

SILENCED = (
    # an optional faster kernel for 4-bit matrices on CPUs; the built-in one is used
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # the Trainer accumulates by itself and tells accelerate 1; DeepSpeed's value is the right one
    ("accelerate.accelerator", "Gradient accumulation steps mismatch"),
    # said while DeepSpeed's CPU communication is compiled on a machine without a GPU
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # a hub that cannot be reached is reported once, by us, with what to do
    ("huggingface_hub.utils._http", "Retrying in "),
    ("huggingface_hub.utils._http", "thrown while requesting"),
)


class _Contains(logging.Filter):
    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def filter(self, record: logging.LogRecord) -> bool:
        return self.part not in record.getMessage()


def silence_known_messages() -> None:
    """Install the filters; called once, when `common` is imported."""
    for name, part in SILENCED:
        logging.getLogger(name).addFilter(_Contains(part))
    # PEFT asks for transformers' attribute by its old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # examples are tokenised one by one in the loader's workers, where the library's own threads only get in the way
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        # DeepSpeed guesses this too, and warns that it guessed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
