# make demo       fine-tune the built-in checkpoint on built-in data; TASK=docvqa|hateful_memes|nlvr2|ucf101
# make test       unit, parity and one short run per method; what CI runs
# make test-all   `make test` and what takes longer: every README command, both DeepSpeed alternatives
# make soak       SEEDS=200: as many training runs to which something is done, each started again; hours
# make bench      ours against the reference's way on this machine's CPU; under 20 minutes, when it is otherwise idle
# make style      ruff, format and lint

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# one thread per process and core; torchrun would warn that it sets this itself
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all soak bench style install install-dev clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-app.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# The demo's options for each task; data and output lie in $(DEMO)/$(TASK).
TASK ?= docvqa
DEMO ?= demo_runs
DATA := $(DEMO)/$(TASK)/$(if $(filter ucf101,$(TASK)),converted,data)
DATA_docvqa := --train_pages 2400
DATA_hateful_memes := --train_pages 2000
DATA_nlvr2 := --train_pages 3200
DATA_ucf101 := --train_pages 1200
DEMO_docvqa := --num_train_epochs 1 --learning_rate 1e-3
DEMO_hateful_memes := --num_train_epochs 2 --learning_rate 2e-3 --freeze_vision_model
DEMO_nlvr2 := --num_train_epochs 1 --learning_rate 2e-3 --freeze_vision_model
DEMO_ucf101 := --num_train_epochs 1 --learning_rate 2e-3 --freeze_vision_model
SPLIT_ucf101 := --eval_split test
SCRIPT = torchrun --nproc_per_node=$$(python -c "import torch; print(min(torch.cuda.device_count() or 2, 2))") \
  finetune_hf_trainer_$(TASK).py --num_crops 1 --batch_size 16 --batch_size_per_gpu 8 --warmup_steps 10 \
  --eval_batch_size_per_gpu 16 --num_workers 1 --no-gradient_checkpointing --overwrite $(SPLIT_$(TASK))

demo: install
	python -m common.demo data --task $(TASK) --out $(DEMO)/$(TASK)/data $(DATA_$(TASK))
ifeq ($(TASK),ucf101)
	python convert_ucf101.py --archive $(DEMO)/ucf101/data/UCF101_subset.tar.gz --out_dir $(DATA) --num_frames 4
endif
	$(SCRIPT) --model_name_or_path common/demo_checkpoint --data_dir $(DATA) --output_dir $(DEMO)/$(TASK)/output \
	  $(DEMO_$(TASK))
	@echo "The same evaluation with the pictures shuffled, where only chance helps:"
	python -m common.demo shuffle $(DATA) --task $(TASK) --out $(DEMO)/$(TASK)/shuffled
	$(SCRIPT) --model_name_or_path $(DEMO)/$(TASK)/output --data_dir $(DEMO)/$(TASK)/shuffled \
	  --output_dir $(DEMO)/$(TASK)/output_shuffled --eval_only

# Beside each other, for a test waits as often as it counts; those of one file share what they start.
USUAL_WORKERS := 3
PYTEST = $(BIN)/python -m pytest -n $(or $(WORKERS),$(USUAL_WORKERS)) --dist loadfile --no-loadscope-reorder

test: install-dev
	$(PYTEST) -m "not long" tests

# of the long tests most run a training of two processes, and wait for its start more than they count
test-all: USUAL_WORKERS := 4
test-all: install-dev
	$(PYTEST) tests

# each seed one run killed, filled up or damaged; OUTPUT=faults.json keeps the figures
SEEDS ?= 200
soak: install-dev
	$(BIN)/python -m tests.faults.harness --seeds $(SEEDS) --bad_inputs 5 $(if $(OUTPUT),--output $(OUTPUT))

bench: install
	OMP_NUM_THREADS=$$(env -u OMP_NUM_THREADS nproc) python -m benchmarks.cpu  # nproc itself obeys the variable

style: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(DEMO)
