# The README's commands, and the checks behind them. Each target sets up .venv if needed; a second run installs nothing.
PYTHON ?= python3
TORCH := torch==2.13.0
BIN := .venv/bin
MODEL ?= flux
WORKERS ?= 2
CONCEPT := trainer/families/miniatures/concept
# Half of each batch are images of other things, so that these stay as they are (docs/miniatures.md).
DEMO := DATASET_NAME= DATASET_CONFIG=trainer/families/miniatures/demo.json PARAMS_MAX_STEPS=200 PARAMS_BATCH_SIZE=8 \
	PARAMS_NETWORK_ALPHA=32 PARAMS_NOISE_OFFSET=0 PARAMS_SAMPLE_EVERY_N_STEPS=100
DEMO_flux := PARAMS_TIMESTEP_SAMPLING=shift
# A fixed learning rate: within so few steps, Prodigy settles on one that is too high for these (docs/miniatures.md).
DEMO_sdxl := PARAMS_OPTIMIZER_TYPE=adamw PARAMS_LEARNING_RATE=1.6e-3 PARAMS_MIN_SNR_GAMMA=5
DEMO_sd3 := PARAMS_OPTIMIZER_TYPE=adamw PARAMS_LEARNING_RATE=5e-4 PARAMS_TIMESTEP_SAMPLING=shift \
	PARAMS_DISCRETE_FLOW_SHIFT=5
DEMO_z-image := $(DEMO_sd3)
DEMO_flux2 := $(DEMO_sd3)
DEMO_qwen-image := $(DEMO_sd3)
DEMO_krea2 := $(DEMO_sd3)
export OMP_NUM_THREADS ?= 2

.PHONY: demo test slow faults scale mutants same lint unit container readme lock clean

# torch comes first and separately: whichever build this machine's pip offers. All else comes from locks with hashes.
.venv/.runtime: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements.lock
	touch $@

# Teaches the embedded base model a new concept on the CPU. Look at .demo/output/sample/contact-sheet.png.
demo: .venv/.runtime
	rm -rf .demo/output
	BASE_MODEL=mini-$(MODEL) SAMPLE_PROMPTS=$(CONCEPT)/prompts.txt TRIGGER_WORD= \
	OUTPUT_PATH=.demo/output CACHE_PATH=.demo/cache HF_HOME=.demo/hf OUTPUT_NAME=demo $(DEMO) $(DEMO_$(MODEL)) \
	$(BIN)/python -m entrypoint
	$(BIN)/python -m trainer.families.miniatures.score .demo/output/sample

# A torch for accelerators has brought the Triton that belongs to it; beside a torch for the CPU the lock's is installed.
.venv/.dev: .venv/.runtime requirements-dev.lock
	if $(BIN)/python -c "import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))"; \
	then sed '/^triton==/,/[^\\]$$/d' requirements-dev.lock; else cat requirements-dev.lock; fi > .venv/dev.lock
	$(BIN)/pip install --quiet --no-deps --require-hashes -r .venv/dev.lock
	touch $@

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -ll -c pyproject.toml -r entrypoint trainer runpod

unit: .venv/.dev
	$(BIN)/pytest -m "not slow and not gpu" tests/entrypoint tests/project tests/trainer/spec tests/trainer/data

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=25 -m "not gpu and not container and not slow and not alone"
	$(BIN)/pytest -m "alone and not gpu and not container and not slow"

# Whole jobs, interrupted jobs, and the concept score with its mutations: about half an hour.
slow: .venv/.dev
	$(BIN)/pytest -rf -m "slow and not container" --ignore tests/faults

# Every row of docs/reliability.md, and fuzzing: about an hour and a half. KILLS, EVERY, STEPS and INPUTS set how much,
# PROCESSES how many jobs are disturbed at the same time, and LOAD how many other processes want a core meanwhile.
faults: .venv/.dev
	$(BIN)/pytest -rf -s tests/faults tests/fuzz
	$(BIN)/python tests/fuzz/run.py --inputs $(or $(INPUTS),1000000)

# What grows with images, machines and GPUs: the costs of COUNTS images, jobs of several machines as network namespaces
# (skipped where these cannot be made, with the reason), and where there is a GPU, a step on one and on all.
scale: .venv/.dev
	$(BIN)/python -m bench scale $(if $(COUNTS),--counts $(COUNTS),--counts 1000 10000 100000 1000000)
	$(BIN)/pytest -rs tests/jobs/test_nodes.py
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/python -m bench gpus --family $(MODEL) --batch 1 4 --gpus $$($(BIN)/python -c "import torch; \
	print(*(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()))"); fi

# How many faults of one line the tests notice, by module, and those that they do not. MOST="0": every fault there is.
mutants: .venv/.dev
	$(BIN)/python tests/mutants/run.py --processes $(WORKERS) $(if $(MOST),--most $(MOST)) $(if $(SEED),--seed $(SEED)) \
	$(foreach module,$(MODULE),--module $(module))

# The proof that a refactoring changes no result: the same jobs on the commit BASE and on the working tree, and every
# difference. ONLY="flux-default sdxl-split": some of the jobs. The first run for a BASE takes twice as long.
same: .venv/.dev
	$(BIN)/python -m bench same $(BASE) $(if $(ONLY),--only $(foreach name,$(ONLY),'$(name)')) $(if $(STRICT_WORDS),--strict-words)

# Builds the image for the CPU and trains in it; if that is not possible here, says why.
container: .venv/.dev
	tests/container/run.sh

readme: .venv/.runtime
	$(BIN)/python -c "import pathlib, re; from entrypoint.settings import help_env; p = pathlib.Path('docs/variables.md'); \
	p.write_text(re.sub(r'(?s)(<!-- variables -->\n).*?(<!-- /variables -->)', lambda m: m[1] + help_env().strip() + '\n' + m[2], p.read_text()))"

# Needed only after pyproject.toml changes. torch and its CUDA libraries have a separate lock, for the image. So does
# FlashAttention 4, whose compiler would otherwise be locked for two versions of CUDA. The locks of trackers are whole:
# their processes see no other packages first, and trackio needs older ones than the image has.
lock:
	printf '$(TORCH)\n' > .venv/torch.txt
	$(BIN)/pip install --quiet uv==0.13.9
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header --python-version 3.11 -c .venv/torch.txt pyproject.toml > .venv/all.lock
	$(BIN)/python -c "import re; parts = re.split(r'(?m)^(?=\S)', open('.venv/all.lock').read()); \
	own = [bool(re.match(r'(torch|triton|nvidia-\S+|cuda-\S+)==', part)) for part in parts]; \
	[open(name, 'w').write(''.join(p for p, o in zip(parts, own) if o is is_torch)) \
	for name, is_torch in (('torch.lock', True), ('requirements.lock', False))]"
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header --python-version 3.11 -c .venv/torch.txt --extra flash-4 pyproject.toml > .venv/flash.lock
	$(BIN)/python -c "import re; all, more = (re.split(r'(?m)^(?=\S)', open(f'.venv/{name}.lock').read()) for name in ('all', 'flash')); \
	there = {part.split('==')[0] for part in all} | {'nvidia-cutlass-dsl-libs-cu12'}; \
	open('entrypoint/fetch/flash_4.lock', 'w').write(''.join(part for part in more if part.split('==')[0] not in there))"
	for name in wandb mlflow trackio; do sed -n "s/^$$name = \[\"\(.*\)\"\]$$/\1/p" pyproject.toml \
		| $(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header --python-version 3.11 - -o entrypoint/trackers/$$name.lock; done
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --group dev -c requirements.lock -o requirements-dev.lock
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --group audit -o .github/audit.lock
	sed -n 's/^runpod = \["\(.*\)"\]$$/\1/p' pyproject.toml \
		| $(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header --python-version 3.11 -o runpod/requirements.lock -

clean:
	rm -rf .venv .demo .same .mypy_cache .ruff_cache .pytest_cache
