# co2d: what there is to do. Everything needs only python3 and make; `make help` lists it.
PYTHON  ?= python3
VENV    ?= .venv
PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONF ?= /etc
STATE   ?= /var/lib/co2d
UNITDIR ?= $(PREFIX)/lib/systemd/system
WEB     ?= var/pub
BACKUP  ?= backup
ROUNDS  ?= 200
TESTS   ?= tests
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help run demo test test-all check bench fuzz soak web backup install uninstall clean

help:           ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run:            ## run the daemon here, on port 8080
	$(PYTHON) co2d.py

demo:           ## a fleet of simulated units, end to end, in a temporary directory
	@$(PYTHON) tests/demo.py

# pytest in a virtual environment of its own; without network an installed pytest will do
test:           ## run the tests, about 2 minutes (TESTS=tests/test_seqfile.py for some)
	@echo "make test: about 2 minutes; what runs long is in make test-all"
	@$(RUN_TESTS)

test-all:       ## the tests, also those that run long: soak, fuzz, scale, power cuts, systemd, a browser; about 20 minutes
	@echo "make test-all: about 20 minutes; tests of programs that are not installed are skipped and say so"
	@LONG=--long; $(RUN_TESTS)

define RUN_TESTS
if $(VENV)/bin/python -m pytest --version >/dev/null 2>&1 || { $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 && \
    $(VENV)/bin/python -m pip install -q --disable-pip-version-check pytest 2>/dev/null; }; \
then $(VENV)/bin/python -m pytest -q -p no:cacheprovider $$LONG $(TESTS); \
elif $(PYTHON) -m pytest --version >/dev/null 2>&1; then $(PYTHON) -m pytest -q -p no:cacheprovider $$LONG $(TESTS); \
else echo "make test: pytest could not be installed here, and $(PYTHON) has none: apt install python3-pytest" >&2; exit 1; fi
endef

check:          ## arrows, plain code, unused code, docstrings; types and style where mypy and ruff are installed
	@$(PYTHON) tests/check.py

bench:          ## all figures of the product in one table, with yardsticks from the same run
	@$(PYTHON) tests/bench.py

fuzz:           ## the parser under random damage, for longer
	@$(PYTHON) tests/fuzz.py

soak:           ## kill -9 under load, ROUNDS times
	@$(PYTHON) tests/soak.py --rounds $(ROUNDS)

setting = $(shell $(PYTHON) co2d.py --print-config | sed -n 's/^$(1) = //p')

web:            ## write the pages as static files to WEB, for cron and another web server
	@mkdir -p $(WEB)
	@$(PYTHON) plot_ascii.py --html -o $(WEB)

# The text is the truth and only grows, so a copy of a running station is consistent: every file is the beginning of
# itself. Bytes that a unit replaces are set aside first, so the second pass finds what the first has missed.
backup:         ## copy the truth (text, updates, configuration) to BACKUP; consistent while the daemon runs
	@mkdir -p $(BACKUP)/remote_data $(BACKUP)/var
	@for pass in 1 2; do cp -au $(call setting,data_dir)/. $(BACKUP)/remote_data/ && \
	    for part in pings fetches pub; do cp -au $(call setting,var_dir)/$$part $(BACKUP)/var/ || exit 1; done || exit 1; done
	@if [ -e co2d.conf ]; then cp -au co2d.conf $(BACKUP)/; fi
	@sync; echo "backup: $$(find $(BACKUP) -type f | wc -l) files in $(BACKUP)"

# The commands import the scripts as modules: Python keeps the bytecode of a module, and compiles a script at every start.
LIB = $(DESTDIR)$(PREFIX)/lib/co2d
BIN = $(DESTDIR)$(PREFIX)/bin
COMMANDS = co2d importer plot_ascii
FIND = sys.path.insert(0, os.path.realpath(__file__ + "/../../lib/co2d"))
LAUNCHER = \#!%s\nimport os, sys\n$(FIND)\nfrom %s import main\nsys.exit(main())\n
install:        ## put scripts, configuration and systemd units in place (DESTDIR, PREFIX, SYSCONF, STATE)
	install -d $(LIB) $(BIN) $(DESTDIR)$(SYSCONF) $(DESTDIR)$(UNITDIR) $(DESTDIR)$(STATE)/remote_data $(DESTDIR)$(STATE)/var
	install -m 755 co2d.py importer.py plot_ascii.py $(LIB)
	install -m 644 seqfile.py $(LIB)
	$(PYTHON) -m compileall -q -d $(PREFIX)/lib/co2d $(LIB)
	python=$$($(PYTHON) -c 'import sys; print(sys.executable)') && for name in $(COMMANDS); do rm -f $(BIN)/$$name; \
	    printf '$(LAUNCHER)' $$python $$name > $(BIN)/$$name && chmod 755 $(BIN)/$$name || exit 1; done
	test -e $(DESTDIR)$(SYSCONF)/co2d.conf || sed -e 's|^#data_dir = .*|data_dir = $(STATE)/remote_data|' \
	    -e 's|^#var_dir = .*|var_dir = $(STATE)/var|' co2d.conf.example > $(DESTDIR)$(SYSCONF)/co2d.conf
	ln -sf $(SYSCONF)/co2d.conf $(LIB)/co2d.conf
	for kind in service socket; do $(PYTHON) $(LIB)/co2d.py --config $(DESTDIR)$(SYSCONF)/co2d.conf --print-unit $$kind \
	    | sed 's|$(DESTDIR)/|/|g' > $(DESTDIR)$(UNITDIR)/co2d.$$kind || exit 1; done
	@echo "then: useradd --system co2d; chown -R co2d:co2d $(STATE); systemctl enable --now co2d.socket co2d.service"

uninstall:      ## take them away again; data and configuration stay
	rm -rf $(LIB)
	rm -f $(DESTDIR)$(UNITDIR)/co2d.service $(DESTDIR)$(UNITDIR)/co2d.socket
	for name in $(COMMANDS); do rm -f $(BIN)/$$name; done

clean:          ## remove what make and Python have left here; never data
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache __pycache__ tests/__pycache__
