#!/usr/bin/env bash
# Everything worth running on one H100 or H200, in under ten minutes, at the full model size, with random weights made
# in place: nothing is downloaded. Correctness comes first. Needs torch, transformers, accelerate and peft; uses flash-attn,
# bitsandbytes and Liger where they are installed, and says at the end what it had to leave out.
#
#     benchmarks/gpu.sh [FOLDER]        where the JSON goes (benchmarks/results)
#
# PYTHON, SECONDS_IN_ALL (570), and for a trial without a GPU: OPTIONS, added to every measurement of a step.
set -u
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-python3}
deadline=${SECONDS_IN_ALL:-570}
options=${OPTIONS:-}
export PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$folder"
left_out=()

for package in torch torchvision transformers accelerate peft; do
  "$python" -c "import $package" 2>/dev/null || { echo "benchmarks/gpu.sh needs $package: pip install -r requirements.txt"; exit 1; }
done
"$python" -c "import flash_attn" 2>/dev/null || left_out+=("flash-attn's kernels: not installed")
"$python" -c "import liger_kernel" 2>/dev/null || left_out+=("Liger's fused loss: not installed")
name=$("$python" - <<'PY'
import re, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print(re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "").strip()) or "none")
PY
)
echo "GPU: $name"

# run LABEL MOST_SECONDS COMMAND...: one measurement, stopped when its time or the whole's is over
run() {
  local label=$1 most=$2 left=$((deadline - SECONDS))
  shift 2
  if ((left < 20)); then left_out+=("$label: no time left"); return 1; fi
  echo; echo "== $label (second $SECONDS)"
  timeout -k 10 $((most < left ? most : left)) "$@"
  local status=$?
  if ((status == 124 || status == 137)); then left_out+=("$label: stopped after its time")
  elif ((status)); then left_out+=("$label: ended with $status, see above"); fi
  return $status
}

# step METHOD MOST_SECONDS VARIANT...: the first variant is what the others are compared with. It ends by itself, and
# writes what it has, before it is stopped; one-question ways ask two questions of each page.
step() {
  local method=$1 most=$2 left=$((deadline - SECONDS))
  shift 2
  # shellcheck disable=SC2086
  run "$method" "$most" "$python" -m benchmarks.throughput --method "$method" --num_crops 16 --rounds 3 --pages_per_turn 4 \
    --questions_per_page 2 --seconds $(((most < left ? most : left) - 30)) \
    --output "$folder/gpu_${name}_$method.json" $options --compare "$@"
}

run "correctness" 120 "$python" -m benchmarks.agree --output "$folder/gpu_${name}_agree.json" ||
  { echo "the gradients were not shown to agree: what follows is not worth timing"; [[ ${ANYWAY:-} ]] || exit 1; }

flex=attention=flex_attention flash=attention=flash_attention_2
step full 130 reference reference:$flash single:recompute=full single:recompute=decoder single \
  single:tokens=8192,$flash,recompute=full single:tokens=8192,$flex,recompute=full \
  shared:$flex,recompute=full shared:$flex shared:tokens=8192,$flex,recompute=full \
  shared:tokens=8192,$flex,recompute=full,kernels=liger
step lora 110 reference reference:$flash single:recompute=full single:recompute=decoder single \
  single:tokens=8192,$flash single:tokens=8192,$flex shared:$flex shared:tokens=8192,$flex \
  shared:tokens=8192,$flex,kernels=liger shared:tokens=8192,$flex,kernels=compiled
if "$python" -c "import bitsandbytes" 2>/dev/null; then
  # also what matters most here: its memory at one question a pass, everything recomputed
  step qlora 120 reference single:recompute=full single:recompute=full,crops=4 single:recompute=decoder single \
    single:tokens=8192,$flex shared:$flex shared:tokens=8192,$flex
else
  left_out+=("qlora: bitsandbytes is not installed")
fi
step frozen 90 reference single:recompute=full single single:tokens=8192,$flex shared:$flex shared:tokens=8192,$flex
run "preprocessing" 60 "$python" -m benchmarks.preprocess --rounds 20 --output "$folder/gpu_${name}_preprocess.json"

echo
echo "done after $SECONDS s; left out: ${#left_out[@]}"
printf '  %s\n' "${left_out[@]:-nothing}"
echo "variants that did not fit into memory or could not run are named above; then: $python -m benchmarks.render"
