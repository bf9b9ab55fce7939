#!/usr/bin/env bash
# Everything worth running on one H100 or H200, in under ten minutes, at the full model size, with random weights made
# in place: nothing is downloaded. Correctness comes first. Needs torch, torchvision, transformers, accelerate and peft;
# uses flash-attn, bitsandbytes and Liger where they are installed, and says at the end what it had to leave out.
#
#     benchmarks/gpu.sh [FOLDER]        where the JSON goes (benchmarks/results)
#
# PYTHON, SECONDS_IN_ALL (570), METHODS ("full qlora lora frozen", or some of them; what is compiled is compared where
# time is left, so with fewer), COMMIT (the code's, where this is no git checkout), and for a trial without a GPU:
# OPTIONS, added to every measurement of a step, CORRECTNESS, to the comparison of gradients, OPTIMIZERS, to that of the
# kinds of AdamW, KERNELS (compiled), those of the fastest variants, which a CPU compiles for minutes, and PATIENCE (1),
# how many times its time a measurement has.
set -u
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-python3}
deadline=${SECONDS_IN_ALL:-570}
methods=${METHODS:-full qlora lora frozen}
options=${OPTIONS:-}
patience=${PATIENCE:-1}
export PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$folder"
left_out=()

# what is missing of what it needs, of what it uses where it is, and the GPU's name: one process, for each takes seconds
{ read -r missing; read -r not_there; read -r name; read -r room; } < <("$python" - <<'PY'
import re
from importlib.util import find_spec
for packages in (("torch", "torchvision", "transformers", "accelerate", "peft"), ("flash_attn", "liger_kernel", "bitsandbytes")):
    print(*(package for package in packages if find_spec(package) is None))
name, room = "none", 8000
if find_spec("torch"):
    import torch
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        # tokens a pass of a method whose weights do not train: 62 GB at 8,000, 114 GB at 16,000
        room = 16000 if torch.cuda.get_device_properties(0).total_memory > 130e9 else 8000
print(re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "").strip()))
print(room)
PY
)
if [[ $missing ]]; then echo "benchmarks/gpu.sh needs $missing: pip install -r requirements.txt"; exit 1; fi
[[ $not_there ]] && left_out+=("what needs $not_there: not installed")
echo "GPU: $name"

# run LABEL MOST_SECONDS COMMAND...: one measurement, stopped when its time or the whole's is over
run() {
  local label=$1 most=$(($2 * patience)) left=$((deadline - SECONDS))
  shift 2
  if ((left < 20)); then left_out+=("$label: no time left"); return 1; fi
  echo; echo "== $label (second $SECONDS)"
  timeout -k 10 $((most < left ? most : left)) "$@"
  local status=$?
  if ((status == 124 || status == 137)); then left_out+=("$label: stopped after its time")
  elif ((status)); then left_out+=("$label: ended with $status, see above"); fi
  return $status
}

# step METHOD MOST_SECONDS VARIANT...: the first variant is what the others are compared with. What it has it writes
# whenever it has more; its first turns, in which layers are compiled, may take most of its time. One-question ways ask
# two questions of each page.
step() {
  local method=$1 own=$2 most=$(($2 * patience)) left=$((deadline - SECONDS))
  shift 2
  [[ " $methods " == *" $method "* ]] || return 0
  # shellcheck disable=SC2086
  run "$method" "$own" "$python" -m benchmarks.throughput --method "$method" --num_crops 16 --rounds 3 --pages_per_turn 6 \
    --questions_per_page 2 --seconds $(((most < left ? most : left) - 15)) \
    --seconds_of_first_turns $(((most < left ? most : left) - 40)) --output "$folder/gpu_${name}_$method.json" $options --compare "$@"
}

# what is compiled takes most of that time: it comes last
# shellcheck disable=SC2086
run "correctness" 120 "$python" -m benchmarks.agree --skip compiled flex \
  --output "$folder/gpu_${name}_agree.json" ${CORRECTNESS:-} || {
  printf '%s\n' "${left_out[@]}" "the gradients were not shown to agree: what follows is not worth timing (ANYWAY=1: all the same)"
  [[ ${ANYWAY:-} ]] || exit 1
}

# what matters most first: where time is short the last ones are left out
packed=tokens=8000
fast=$packed,kernels=${KERNELS:-compiled}
widest=tokens=$room,kernels=${KERNELS:-compiled}
step full 110 reference single:$fast shared:$fast single:$packed,kernels=liger single:recompute=full
if [[ $not_there != *bitsandbytes* ]]; then
  # its memory at one question a pass, everything recomputed, matters as much as its speed
  step qlora 160 reference single:recompute=full single:$widest shared:$widest
else
  left_out+=("qlora")
fi
step lora 150 reference single:recompute=full single:$widest shared:$widest
step frozen 70 reference single:$fast shared:$fast single:recompute=full
run "correctness of what is compiled" 400 "$python" -m benchmarks.agree --only compiled flex \
  --output "$folder/gpu_${name}_agree_compiled.json" ${CORRECTNESS:-}
run "preprocessing" 60 "$python" -m benchmarks.preprocess --rounds 20 --output "$folder/gpu_${name}_preprocess.json"

# shellcheck disable=SC2086
run "kinds of AdamW" 60 "$python" -m benchmarks.optimizers --method full --rounds 3 ${OPTIMIZERS:-} \
  --output "$folder/gpu_${name}_optimizers.json"

echo
echo "done after $SECONDS s; left out: ${#left_out[@]}"
printf '  %s\n' "${left_out[@]:-nothing}"
echo "variants that did not fit into memory or could not run are named above; then: $python -m benchmarks.render"
