# co2d: what there is to do. Everything needs only python3 and make; `make help` lists it.
PYTHON  ?= python3
VENV    ?= .venv
PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONF ?= /etc
STATE   ?= /var/lib/co2d
UNITDIR ?= $(PREFIX)/lib/systemd/system
WEB     ?= web
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

test:           ## run the tests, about 2 minutes (TESTS=tests/test_seqfile.py for some)
	@echo "make test: about 2 minutes; what runs long is in make test-all"
	@$(IN_MEMORY); $(FIND_PYTEST); \
	if [ "$(TESTS)" = tests ]; then $(RUN_HALVES); else $$pytest $(TESTS); fi

test-all:       ## the tests, also those that run long: soak, fuzz, scale, power cuts, systemd, a browser; about 10 minutes
	@echo "make test-all: about 10 minutes; tests of programs that are not installed are skipped and say so"
	@$(FIND_PYTEST); $$pytest --long $(TESTS)

# Most of the time goes into syncs: a disk in memory takes them at once. make test-all uses the real disk.
IN_MEMORY = if [ "$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}')" -gt 2000000 ] 2>/dev/null && \
    ! grep -q ' /dev/shm .*noexec' /proc/mounts; then export TMPDIR=/dev/shm; fi

# pytest in a virtual environment of its own; without network an installed pytest will do
define FIND_PYTEST
if $(VENV)/bin/python -m pytest --version >/dev/null 2>&1 || { $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 && \
    $(VENV)/bin/python -m pip install -q --disable-pip-version-check pytest 2>/dev/null; }; \
then python="$(VENV)/bin/python"; \
elif $(PYTHON) -m pytest --version >/dev/null 2>&1; then python="$(PYTHON)"; \
else echo "make test: pytest could not be installed here, and $(PYTHON) has none: apt install python3-pytest" >&2; exit 1; fi; \
pytest="$$python -m pytest -q -p no:cacheprovider -o tmp_path_retention_policy=failed"
endef

# Half of the time goes into waiting for daemons, so two halves run side by side. The second shows what it found at its end.
FIRST_HALF  = $(filter-out $(SECOND_HALF),$(wildcard tests/test_*.py))
SECOND_HALF = $(wildcard tests/test_p[or-u]*.py tests/test_[q-z]*.py)
define RUN_HALVES
found=$$(mktemp); \
$$pytest $(SECOND_HALF) > "$$found" 2>&1 & second=$$!; \
$$pytest $(FIRST_HALF); first=$$?; \
wait $$second; second=$$?; \
cat "$$found"; rm -f "$$found"; \
exit $$((first + second))
endef

check:          ## arrows, plain code, unused code, docstrings; types and style where mypy and ruff are installed
	@$(PYTHON) tests/check.py

bench:          ## all figures of the product in one table, with yardsticks from the same run
	@$(PYTHON) tests/bench.py

fuzz:           ## the parser under random damage, for longer
	@$(PYTHON) tests/fuzz.py

soak:           ## kill -9 under load, ROUNDS times
	@$(PYTHON) tests/soak.py --rounds $(ROUNDS)

web:            ## write the pages as files to the directory WEB, for another web server
	@$(PYTHON) plot_ascii.py --html -o $(WEB)/

backup:         ## copy text, updates and configuration to BACKUP, also while the daemon runs
	@$(PYTHON) co2d.py backup $(BACKUP)

install:        ## put scripts, configuration and systemd units in place, or newer ones (DESTDIR, PREFIX, SYSCONF, STATE)
	@sh -c "$$INSTALL"

uninstall:      ## stop it and take it away again; data and configuration stay
	@sh -c "$$UNINSTALL"

# What is installed. The commands import the scripts as modules: Python keeps the bytecode of a module, and compiles a
# script at every start. They name the Python that the service's user can run.
COMMANDS = co2d importer plot_ascii
FIND = sys.path.insert(0, os.path.realpath(__file__ + "/../../lib/co2d"))
# Loading makes many objects and no garbage: without a look for it a page takes a tenth less. Ctrl-C is no traceback then.
LAUNCHER = \#!%s\nimport gc, os, signal, sys\n$(FIND)\ngc.disable()\nwas = signal.signal(signal.SIGINT, signal.SIG_DFL)\nfrom %s import main\nsignal.signal(signal.SIGINT, was)\ngc.enable()\nsys.exit(main())\n

define INSTALL
set -eu
umask 022
root="$(DESTDIR)"  lib="$(PREFIX)/lib/co2d"  bin="$(PREFIX)/bin"  units="$(UNITDIR)"  conf="$(SYSCONF)/co2d.conf"
new="$$root$$lib.new"                               # beside its place: the same file system, the same directories above
stage=$$(mktemp -d)
trap 'rm -rf "$$new" "$$stage" "$$root$$conf.check"' EXIT
made_user=
refuse() {
    if [ -n "$$made_user" ]; then userdel co2d; fi
    printf 'make install: %s\nmake install: nothing was changed\n' "$$1" >&2
    exit 1
}

# 1. The user of the service; none for a package (DESTDIR) or for somebody who is not root.
system=
as_user() { "$$@"; }
if [ -z "$$root" ] && [ "$$(id -u)" = 0 ]; then
    system=yes
    as_user() { (cd / && runuser -u co2d -- "$$@"); }
    if ! id co2d >/dev/null 2>&1; then
        useradd --system --user-group --home-dir "$(STATE)" --no-create-home --shell /usr/sbin/nologin co2d ||
            refuse "there is no user co2d, and it could not be made"
        made_user=yes
    fi
fi

# 2. A Python that this user can run: not one below /root.
python=
for candidate in $$($(PYTHON) -c 'import sys; print(sys.executable)') /usr/bin/python3; do
    if as_user "$$candidate" -c 'import sys, sqlite3; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        python=$$candidate
        break
    fi
done
if [ -z "$$python" ]; then refuse "the user co2d can run no Python 3.9 or newer, with sqlite3: neither $(PYTHON) nor /usr/bin/python3"; fi

# 3. Everything aside.
rm -rf "$$new"
install -d "$$new"
install -m 755 co2d.py importer.py plot_ascii.py "$$new"
install -m 644 seqfile.py "$$new"
"$$python" -m compileall -q -d "$$lib" "$$new"
ln -s "$$conf" "$$new/co2d.conf"
config="$$root$$conf"
if [ ! -e "$$config" ]; then
    config="$$stage/co2d.conf"
    sed -e 's|^#data_dir = .*|data_dir = $(STATE)/remote_data|' -e 's|^#var_dir = .*|var_dir = $(STATE)/var|' \
        co2d.conf.example > "$$config"
fi
for name in $(COMMANDS); do printf '$(LAUNCHER)' "$$python" $$name > "$$stage/$$name"; done

# 4. Does it all work, for this user too?
said=$$("$$python" "$$new/co2d.py" --config "$$config" --check-config 2>&1) || refuse "$$said"
setting() { "$$python" "$$new/co2d.py" --config "$$config" --print-config | sed -n "s/^$$1 = //p"; }
data_dir=$$(setting data_dir)  var_dir=$$(setting var_dir)  db=$$(setting db)
case "$$data_dir $$var_dir $$db" in *"$$new"*)
    refuse "data_dir or var_dir would lie in $$lib, which each install replaces: name other directories in $$conf";;
esac
if [ -n "$$system" ]; then
    install -D -m 640 -g co2d "$$config" "$$conf.check"
    said=$$(as_user "$$python" "$$new/co2d.py" --config "$$conf.check" --check-config 2>&1) || refuse "as the user co2d: $$said"
    for path in "$$data_dir" "$$var_dir" "$$(dirname "$$db")" "$$db"; do
        if [ -e "$$path" ] && ! as_user test -w "$$path"; then
            refuse "the user co2d may not write $$path: chown -R co2d:co2d $$path"
        fi
    done
fi
for kind in service socket; do
    "$$python" "$$new/co2d.py" --config "$$config" --print-unit $$kind > "$$stage/unit" || refuse "there is no co2d.$$kind"
    sed -e "s|$$new|$$lib|g" -e "s|$$config|$$conf|g" -e "s|$$root/|/|g" "$$stage/unit" > "$$stage/co2d.$$kind"
done

# 5. In place.
new_socket=yes
if cmp -s "$$stage/co2d.socket" "$$root$$units/co2d.socket"; then new_socket=; fi
if [ ! -e "$$root$$conf" ]; then install -D -m 640 "$$config" "$$root$$conf"; fi
rm -rf "$$root$$lib.old"
if [ -e "$$root$$lib" ]; then mv "$$root$$lib" "$$root$$lib.old"; fi
mv "$$new" "$$root$$lib"
rm -rf "$$root$$lib.old"
install -d "$$root$$bin" "$$root$$units"
for name in $(COMMANDS); do install -m 755 "$$stage/$$name" "$$root$$bin/$$name"; done
install -m 644 "$$stage/co2d.service" "$$stage/co2d.socket" "$$root$$units"
if [ -z "$$system" ]; then
    install -d "$$root$$data_dir" "$$root$$var_dir"
    echo "co2d is in $$root$$lib, its configuration is $$root$$conf; a user co2d is to own $$data_dir and $$var_dir"
    exit 0
fi
chown root:co2d "$$conf"
chmod 640 "$$conf"
if [ ! -e "$(STATE)" ]; then install -d -o co2d -g co2d -m 750 "$(STATE)"; fi
for path in "$$data_dir" "$$var_dir" "$$(dirname "$$db")"; do
    if [ ! -e "$$path" ]; then install -d -o co2d -g co2d -m 750 "$$path"; fi
done
echo "co2d is in $$lib and runs with $$python; its configuration is $$conf"
if [ ! -d /run/systemd/system ]; then exit 0; fi
systemctl daemon-reload
if [ "$$(systemctl is-active co2d.service)" = inactive ]; then
    echo "then: systemctl enable --now co2d.socket co2d.service"
    exit 0
fi
systemctl reset-failed co2d.socket co2d.service
if [ -n "$$new_socket" ]; then systemctl restart co2d.socket; fi       # the service goes with it: another port
systemctl restart co2d.service
endef
export INSTALL

define UNINSTALL
set -eu
if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl -q disable --now co2d.socket co2d.service || true; fi
rm -rf "$(DESTDIR)$(PREFIX)/lib/co2d"
rm -f "$(DESTDIR)$(UNITDIR)/co2d.service" "$(DESTDIR)$(UNITDIR)/co2d.socket"
for name in $(COMMANDS); do rm -f "$(DESTDIR)$(PREFIX)/bin/$$name"; done
if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
echo "the configuration $(DESTDIR)$(SYSCONF)/co2d.conf, the data and the user co2d stay"
endef
export UNINSTALL

clean:          ## remove what make and Python have left here; never data
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache __pycache__ tests/__pycache__
