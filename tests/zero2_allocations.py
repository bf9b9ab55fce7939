"""What DeepSpeed's ZeRO-2 holds on a CPU, by PyTorch's allocator; run by test_plan.py in a process of its own.

    python -m tests.zero2_allocations METHOD DEEPSPEED_JSON ACCUMULATION

Prints JSON: the most that is held in a step's last backward pass and in its optimizer's step, in bytes. What DeepSpeed
makes is counted, its copy of the trained weights too; the weights that the model began with are not.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "CUDA_VISIBLE_DEVICES": "",
}
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja

import deepspeed
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.phi3v import Phi3VForCausalLM
from tests.launch import free_port
from tests.test_plan import forward, prepare, small_config

METHOD, FILE, ACCUMULATION = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
STEPS = 2  # the optimizer's state is made in the first


def main() -> None:
    os.environ["MASTER_PORT"] = str(free_port())
    deepspeed.init_distributed(dist_backend="gloo")
    model = prepare(Phi3VForCausalLM(small_config()).to(torch.bfloat16), METHOD, "full")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    config = json.loads(FILE.read_text()) | {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    config |= {"gradient_clipping": 1.0, "zero_allow_untested_optimizer": True, "train_micro_batch_size_per_gpu": 1}
    config |= {"gradient_accumulation_steps": ACCUMULATION, "train_batch_size": ACCUMULATION}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer = torch.optim.AdamW(trained, fused=True)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
        for number in range(STEPS * ACCUMULATION):
            loss, pixels = forward(engine, METHOD)
            with record_function(f"backward {number}"):
                engine.backward(loss)
            del loss, pixels  # as the Trainer lets go of a batch
            gc.collect()  # cycles would be collected at any time, or not before the step has been counted
            with record_function(f"step {number}"):
                engine.step()
    events = profiler.profiler.kineto_results.events()
    last = STEPS * ACCUMULATION - 1
    spans = {event.name(): event for event in events if event.name() in (f"backward {last}", f"step {last}")}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = {}
    for name, span in spans.items():
        begins, ends, live = span.start_ns(), span.start_ns() + span.duration_ns(), 0
        for moment, change in changes:
            live += change
            if begins <= moment < ends:
                most[name.split()[0]] = max(most.get(name.split()[0], 0), live)
    print(json.dumps(most))


if __name__ == "__main__":
    main()
