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

.PHONY: help run demo test check bench fuzz soak web backup install uninstall clean

help:           ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run:            ## run the daemon here, on port 8080
	$(PYTHON) co2d.py

demo:           ## a fleet of simulated units, end to end, in a temporary directory
	@$(PYTHON) tests/demo.py

# pytest in a virtual environment of its own; without network an installed pytest will do
test:           ## run the tests (TESTS=tests/test_seqfile.py for some)
	@if $(VENV)/bin/python -m pytest --version >/dev/null 2>&1 || { $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 && \
	    $(VENV)/bin/python -m pip install -q --disable-pip-version-check pytest 2>/dev/null; }; \
	then $(VENV)/bin/python -m pytest -q -p no:cacheprovider $(TESTS); \
	elif $(PYTHON) -m pytest --version >/dev/null 2>&1; then $(PYTHON) -m pytest -q -p no:cacheprovider $(TESTS); \
	else echo "make test: pytest could not be installed here, and $(PYTHON) has none: apt install python3-pytest" >&2; exit 1; fi

check:          ## arrows, sizes, unused code, docstrings; types and style where mypy and ruff are installed
	@$(PYTHON) tests/check.py

bench:          ## all figures of the product in one table, with yardsticks from the same run
	@$(PYTHON) tests/bench.py

fuzz:           ## the parser under random damage, for longer
	@$(PYTHON) -c "import sys; sys.path[:0] = ['tests']; import fuzz; sys.exit(fuzz.main())"

soak:           ## kill -9 under load, ROUNDS times
	@$(PYTHON) tests/soak.py --rounds $(ROUNDS)

web:            ## write the pages as static files to WEB, for cron and another web server
	@mkdir -p $(WEB)
	@$(PYTHON) plot_ascii.py --html -o $(WEB)

backup:         ## copy the truth (text, updates, configuration) to BACKUP; consistent while the daemon runs
	@$(PYTHON) tests/backup.py $(BACKUP)

install:        ## put scripts, configuration and systemd units in place (DESTDIR, PREFIX, SYSCONF, STATE)
	install -d $(DESTDIR)$(PREFIX)/lib/co2d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(SYSCONF) $(DESTDIR)$(UNITDIR)
	install -m 755 co2d.py importer.py plot_ascii.py $(DESTDIR)$(PREFIX)/lib/co2d
	install -m 644 seqfile.py $(DESTDIR)$(PREFIX)/lib/co2d

uninstall:      ## take them away again; data and configuration stay
	rm -rf $(DESTDIR)$(PREFIX)/lib/co2d

clean:          ## remove what make and Python have left here; never data
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache __pycache__ tests/__pycache__
