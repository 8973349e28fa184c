# make dream      a fresh machine to a trained agent: sets up .venv, trains carracing-quick, prints where its report is
# make test       the default tests; make test-all adds those marked slow; make lint checks style, types and layers
# make audit      a bill of materials of what is pinned (sbom.json), and its known holes; needs a registry with advisories
# Needs Python 3.11 or newer. PYTHON=... chooses another one.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(name))))
BIN := .venv/bin
READY := .venv/.ready
RUN := runs/carracing-quick

AUDIT := .venv-audit

.PHONY: dream test test-all lint audit setup constraints clean

dream: $(READY)
	$(BIN)/oneira train carracing-quick --run $(RUN)
	@echo "The report: $(CURDIR)/$(RUN)/report.html"

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p oneira
	PYTHONPATH=.typing $(BIN)/lint-imports

audit: $(AUDIT)/bin/pip-audit
	$(AUDIT)/bin/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --output-reproducible --output-file sbom.json
	$(AUDIT)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

# The newest of both: they are no part of the project, and what they know should be new.
$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit cyclonedx-bom

setup: $(READY)

# uv is used where it works, because it is faster; pip does the same.
$(READY): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Oneira needs Python 3.11 or newer; none was found on PATH." >&2; exit 4; }
	@if uv --version >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
		VIRTUAL_ENV="$(CURDIR)/.venv" uv pip install --quiet -c constraints.txt -e '.[test]'; \
	else \
		test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
		$(BIN)/python -m pip install --quiet --upgrade pip && $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'; \
	fi
	@touch $@

# Pins what is installed now; only packages that the project needs end up there when it is run in a fresh .venv.
constraints:
	VIRTUAL_ENV="$(CURDIR)/.venv" uv pip freeze --exclude-editable > constraints.txt

clean:
	rm -rf $(AUDIT) sbom.json build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
