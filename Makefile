# make report | make test | make lab: each makes .venv first if it is not there, or not finished;
# make test alone adds the tools of the tests to it.
# PYTHON=python3.12 chooses the Python; ARGS="05 --device cpu" goes to `posmat report`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.tested
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: report test lab

report: $(STAMP)
	@$(BIN)/posmat report $(ARGS)

test: $(TESTED)
	@$(BIN)/python -m pytest $(ARGS)

lab: $(STAMP)
	@$(BIN)/jupyter lab notebooks

# The stamp is written last: a set-up that was interrupted has none and begins anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
	sys.version_info >= (3, 11) or sys.exit("posmat needs Python 3.11 or newer, and $(PYTHON) is " + v + ": name another one, as in make PYTHON=python3.12.")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	echo "posmat needs the venv module, and $(PYTHON) comes without it: install it (on Debian: apt install python3-venv), or name another Python, as in make PYTHON=python3.12." >&2; exit 1; }
	@echo "Installing into $(VENV); once, and about a minute where PyTorch is at hand." >&2
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

# What the tests need beside the package, which is there and is not built again.
$(TESTED): $(STAMP)
	@$(PIP) 'posmat[test]'
	@touch $@

