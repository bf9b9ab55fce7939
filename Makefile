# make demo       fine-tune the built-in checkpoint on the built-in pages
# make test       unit, parity and one short run per method; what CI runs
# make test-all   `make test` and what takes longer: every README command, both DeepSpeed alternatives
# make style      ruff, format and lint

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# one thread per process and core; torchrun would warn that it sets this itself
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all style install install-dev clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/python -m common.demo data --task docvqa --out demo_data
	$(BIN)/torchrun --nproc_per_node=$$($(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)") \
	  finetune_hf_trainer_docvqa.py --model_name_or_path common/demo_checkpoint --data_dir demo_data \
	  --output_dir demo_output --overwrite --num_crops 1 --num_train_epochs 3 --learning_rate 3e-4 --warmup_steps 10 \
	  --eval_batch_size_per_gpu 16 --num_workers 1

test: install-dev
	$(BIN)/python -m pytest -m "not long" tests

test-all: install-dev
	$(BIN)/python -m pytest tests

style: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) demo_data demo_output output
