# Every recipes/NAME/train.py is the target NAME, and every recipes/NAME/train_MORE.py the target NAME-MORE.
RECIPES := $(sort $(patsubst recipes/%/train.py,%,$(wildcard recipes/*/train.py)) \
	$(subst /train_,-,$(patsubst recipes/%.py,%,$(wildcard recipes/*/train_*.py))))
# a pipe fails with its first command: the set-up shows pip's lines through sed
SHELL := bash
.SHELLFLAGS := -o pipefail -c

# the newest supported Python that runs here; pyenv has a python3.x on the path for versions that do not run
SUPPORTED := sys.version_info[:2] in ((3, 11), (3, 12), (3, 13))
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,\
	$(shell $(p) -c 'import sys; sys.exit(not $(SUPPORTED))' 2>/dev/null && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RECIPE ?= ner
MODEL ?= outputs/$(RECIPE)

# GPUS=n runs n processes on this machine; without it one process uses the hardware that it finds
ifeq ($(GPUS),)
RUN := $(BIN)/python -m
else ifeq ($(GPUS),1)
RUN := $(BIN)/accelerate launch --num_processes 1 -m
else
RUN := $(BIN)/accelerate launch --multi_gpu --num_processes $(GPUS) -m
endif

.DEFAULT_GOAL := help
.PHONY: help setup test soak bench lint format predict compare domains sweep annotate transfer labels $(RECIPES)

help: ## list the targets
	@echo "Recipes: make NAME ARGS=\"--argument value ...\" GPUS=n   (ARGS=--help lists the arguments)"
	@for r in $(RECIPES); do printf '  %-26s %s\n' $$r "$$(sed -n '1s/^"""//p' recipes/$$(echo $$r | sed -e 's/-/\/train_/' -e t -e 's/$$/\/train/').py)"; done
	@echo "Commands: predict, compare, domains, sweep, annotate, transfer, test and bench take ARGS too, compare, domains and transfer also GPUS; predict uses a GPU if there is one"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-26s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

predict: $(INSTALLED) ## run a saved model over a file: RECIPE=ner MODEL=outputs/ner INPUT=texts.jsonl OUTPUT=new.jsonl
	$(if $(and $(INPUT),$(OUTPUT)),,$(error give INPUT=, the file to read, and OUTPUT=, the file to write))
	$(BIN)/python -m recipes.$(RECIPE).predict --model "$(MODEL)" --input "$(INPUT)" --output "$(OUTPUT)" $(ARGS)

compare: $(INSTALLED) ## compare tuning methods or settings: RECIPE=ner METHODS="full head lora", or SETTINGS=FILE
	$(BIN)/python -m common.tools.compare $(RECIPE) $(if $(METHODS),--methods $(METHODS)) $(if $(SETTINGS),--settings $(SETTINGS)) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

domains: $(INSTALLED) ## score each domain by models trained without it: RECIPE=sentiment ARGS="--domain_column topic ..." SEEDS="1 2 3"
	$(BIN)/python -m common.tools.domains $(RECIPE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

sweep: $(INSTALLED) ## search for the best arguments of a recipe: RECIPE=ner TRIALS=20
	$(BIN)/python -m common.tools.sweep $(RECIPE) $(if $(TRIALS),--trials $(TRIALS)) $(ARGS)

annotate: $(INSTALLED) ## choose rows to label next: RECIPE=ner MODEL=outputs/ner INPUT=pool.jsonl OUTPUT=new.jsonl N=50 STRATEGY=margin
	$(if $(and $(INPUT),$(OUTPUT)),,$(error give INPUT=, the rows to choose from, and OUTPUT=, the file to write))
	$(BIN)/python -m common.tools.annotate $(RECIPE) --model "$(MODEL)" --input "$(INPUT)" --output "$(OUTPUT)" \
		$(if $(N),--n $(N)) $(if $(STRATEGY),--strategy $(STRATEGY)) $(ARGS)

transfer: $(INSTALLED) ## measure the gain by pretraining, a domain or another task: PLAN=FILE SEEDS="1 2 3"; PREDICT=only ranks
	$(BIN)/python -m common.tools.transfer $(if $(PLAN),--plan "$(PLAN)") $(if $(PREDICT),--predict $(PREDICT)) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

labels: PLAN := common/tools/plans/labels.yaml
labels: transfer ## compare ways to train by number of labels: DATA=/folder/of/the/data

setup: $(INSTALLED) ## create .venv and install the pinned requirements

# --use-pep517: older versions of pip cannot build seqeval without it
$(INSTALLED): requirements.txt
	$(if $(PYTHON),,$(error no Python 3.11, 3.12 or 3.13 runs here; install one, or name it: make PYTHON=/path/to/python3.13))
	@$(PYTHON) -c 'import sys; sys.exit(not $(SUPPORTED))' || \
		{ echo "$(PYTHON): Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python3.13"; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): this takes a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --use-pep517 -r requirements.txt | sed -u -n 's/^Collecting \(.*\)/  \1/p; s/^Successfully installed .*/  installed/p'
	touch $@

$(RECIPES): $(INSTALLED)
	$(RUN) recipes.$(if $(findstring -,$@),$(subst -,.train_,$@),$@.train) $(ARGS)

test: $(INSTALLED) ## run all tests
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(ARGS)

soak: $(INSTALLED) ## kill, stop, starve and damage runs many times over; far longer than test
	$(BIN)/python -m tests.soak $(ARGS)
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal --soak

bench: $(INSTALLED) ## measure speed against the stock Trainer, an hour: RECIPE=ner, ARGS=--scaling (by size), ARGS=--busy (busy machine)
	$(BIN)/python -m tests.benchmarks.bench $(if $(filter-out file,$(origin RECIPE)),$(RECIPE)) $(ARGS)

lint: $(INSTALLED) ## check format and rules (ruff), and the types of common/ (mypy)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

format: $(INSTALLED) ## format the code (ruff)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
