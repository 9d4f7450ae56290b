# Each target sets the environment up when it is not there: a .venv with the locked packages.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
READY := $(VENV)/.ready

.PHONY: help profile repro ablations test test-fast test-processors check gate format lock benchmarks clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | awk -F'\t' '{ printf "make %-16s %s\n", $$1, $$2 }'

profile: $(READY)  ## params.yaml as profiles/NAME.yaml has it; without NAME: the list of them
	python -m pipeline profile $(NAME)

repro: $(READY)  ## the whole graph, from raw audio to reports/report.html; as `dvc repro`, two stages at a time or JOBS; PROFILE=name first
	$(if $(PROFILE),python -m pipeline profile $(PROFILE))
	python -m pipeline repro $(if $(JOBS),--jobs $(JOBS))

ablations: $(READY)  ## every ablation as an experiment, and one table of them in the report; hours
	python -m pipeline ablations; code=$$?; dvc repro --force --single-item report && exit $$code

test: $(READY)  ## every test, the whole graph on profiles/tiny.yaml included
	python -m pytest

test-fast: $(READY)  ## the everyday suite
	python -m pytest -m "not slow"

# Libraries choose their sums by the processor's instructions. "default" and SSE41 are what every x86-64 has.
PROCESSORS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 \
  ONEDNN_MAX_CPU_ISA=AVX512_CORE AS_IT_IS=1

test-processors: $(READY)  ## the everyday suite as six kinds of processor round, the slow tests as two; on x86-64, an hour
	@for kind in $(PROCESSORS); do echo "== $$kind"; env $$kind python -m pytest -m "not slow" || exit 1; done
	@for kind in "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41" AS_IT_IS=1; do \
	  echo "== $$kind, slow"; env $$kind python -m pytest -m slow || exit 1; done

check: $(READY)  ## ruff, ruff format, mypy --strict
	ruff check .
	ruff format --check .
	mypy

gate: $(READY)  ## the bounds of params.yaml, held against the committed reports/metrics.json
	python -m pipeline gate

format: $(READY)  ## ruff, writing
	ruff check --fix .
	ruff format .

benchmarks: $(READY)  ## each prints ratios measured in one run
	for b in resample mining training_step side_by_side linear istft mae upstream_step mixit "mixit --seconds 10" favor "favor --encoder" "evaluation --pairs 1000" pairs scale; do python -m benchmarks.$$b || exit 1; done

# Debian's python3 without python3-venv has no ensurepip: then pip is put in from outside. By its full path, since the
# python3 that PATH finds is the new .venv's as soon as there is one.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 13) else "Python 3.11 or 3.12 is needed, not %d.%d: make PYTHON=python3.12" % v[:2])'
	python=$$($(PYTHON) -c 'import os, sys; print(os.path.realpath(sys.executable))'); \
	  $$python -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); $$python -m venv --without-pip $(VENV) && $$python -m pip --python $(VENV)/bin/python install pip; }
	@echo "Setting up $(VENV): some 2 GB to download and 6 GB of disk, minutes on a fast line; once."
	@df -Pk . | awk 'NR == 2 && $$4 < 7000000 { print "error: " int($$4 / 1000000) " GB are free here, and the packages and the default run take 7"; exit 1 }'
	$(VENV)/bin/python -m pip install --require-hashes -r requirements.txt
	@printf '%s\n' '#!/bin/sh' 'PYTHONPATH="$(CURDIR)" exec "$(CURDIR)/$(VENV)/bin/python" -m pipeline.separate "$$@"' > $(VENV)/bin/separate
	@chmod +x $(VENV)/bin/separate
	touch $@

lock: $(READY)  ## requirements.txt from pyproject.toml; no hosts, hashes for every file
	python -m pip install --quiet uv
	uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --extra dev --no-emit-index-url \
	  --no-emit-find-links --custom-compile-command "make lock" pyproject.toml -o requirements.txt

clean:  ## what `make repro` made, the cache and the synthetic corpus included; what you put into data/ stays
	rm -rf data/manifest data/sed data/mae data/performer data/clips/train data/clips/eval data/anchors/train \
	  data/anchors/eval data/pairs/train data/pairs/eval data/separators/* data/scores/* \
	  data/mixit/* data/mixit_scores/* data/exports data/music/index data/music/synthetic data/synthetic data/scratch data/timings .dvc/cache .dvc/tmp
