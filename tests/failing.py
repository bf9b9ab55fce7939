"""Two processes of which the second comes to its own end while the first waits for it; a script for torchrun.

python tests/failing.py HOW
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from common.errors import UserError, note_options, run
from common.together import on_first

NO_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free. Including non-PyTorch memory, this process has 77.60 GiB memory in use. Of the allocated memory 73.25 GiB "
    "is allocated by PyTorch, and 3.20 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def options_of(**given: object) -> argparse.Namespace:
    """What `parse_options` gives, as far as it matters to memory."""
    values = {"method": "full", "batch_size": 64, "batch_size_per_gpu": 4, "max_tokens_per_gpu": None, "num_crops": 16}
    values |= {"gradient_checkpointing": "none", "eval_batch_size_per_gpu": 4, "max_crops_per_call": None, "bf16": True}
    values |= {"freeze_vision_model": False, "deepspeed": None, "device": "cuda", "eval_only": False, "num_workers": 4}
    values |= {"num_processes": 8, "model_name_or_path": "microsoft/Phi-3.5-vision-instruct", "lora_rank": 64}
    values |= {"torch_compile": False, "packs": given.get("max_tokens_per_gpu") is not None}
    values |= {"overwrite": False, "resume": "auto"}
    return argparse.Namespace(**{**values, **given})


def end(how: str) -> None:
    """Come to an end."""
    print(f"FAILED {time.time()}\n", end="", flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        sys.exit(3)
    elif how == "user":
        raise UserError("data.parquet, row 7: there is no image")
    elif how == "memory":
        note_options(options_of())
        raise torch.OutOfMemoryError(NO_MEMORY)
    elif how == "stuck":  # an exception, and a thread that never ends
        threading.Thread(target=time.sleep, args=(600,)).start()
    raise KeyError("what went wrong first")


def main() -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if sys.argv[1] == "full":  # the first one's disk, of which both hear
        on_first(lambda: Path("/dev/full").write_text("no byte of it"))
    if dist.get_rank() == 1:
        end(sys.argv[1])
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    run(main)
