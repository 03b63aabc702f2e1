"""`make install` on a Debian with systemd, booted for real by systemd-nspawn. Needs root, network at the first time, 250 MB.

The tree that mmdebstrap makes is kept in the temporary directory for the next time; what a test writes is not: it goes to
memory. Commands run in the machine through its namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time

import pytest

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TREE = os.path.join(tempfile.gettempdir(), "co2d-debian-bookworm")
PACKAGES = "systemd,systemd-sysv,dbus,python3,make,curl,procps"
START = "systemctl enable --now co2d.socket co2d.service"
STATE = "systemctl is-active co2d.service co2d.socket"

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="only root can boot a machine")]


def make_tree():
    """The Debian tree; skips where it cannot be made."""
    if not os.path.exists(TREE):
        done = subprocess.run(["mmdebstrap", "--variant=minbase", "--include=" + PACKAGES, "bookworm", TREE + ".new"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode:
            shutil.rmtree(TREE + ".new", ignore_errors=True)
            pytest.skip("mmdebstrap makes no Debian here: " + done.stdout[-300:])
        os.rename(TREE + ".new", TREE)


class Machine:
    """A booted Debian; the project is in /src, read-only."""

    def __init__(self):
        self.nspawn = subprocess.Popen(
            ["systemd-nspawn", "-D", TREE, "--boot", "--volatile=overlay", "--register=no", "--keep-unit", "--console=pipe",
             "--private-network", "--quiet", "--bind-ro=%s:/src" % PROJECT],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True)
        end = time.monotonic() + 30
        while time.monotonic() < end:                           # there is nothing to wait for but its answer
            if self.nspawn.poll() is not None:
                pytest.skip("systemd-nspawn boots nothing here: " + self.nspawn.stderr.read()[-300:])
            if self.leader() and self.run("systemctl is-system-running --wait").returncode == 0:
                return
        self.stop()
        pytest.skip("the machine did not come up within 30 s")

    def leader(self):
        """The process that is number 1 in the machine."""
        with open("/proc/%d/task/%d/children" % (self.nspawn.pid, self.nspawn.pid)) as file:
            children = file.read().split()
        return children[0] if children else ""

    def run(self, script):
        return subprocess.run(["nsenter", "-t", self.leader(), "-a", "sh", "-c", "cd /; " + script], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, cwd="/")

    def says(self, script):
        """What a script prints, its errors too."""
        return self.run(script).stdout

    def install(self):
        return self.run("make -s -C /src install 2>&1")

    def journal(self, lines=10):
        return self.says("journalctl -u co2d -n %d --no-pager -o cat" % lines)

    def stop(self):
        self.nspawn.terminate()
        self.nspawn.wait(60)


@pytest.fixture(scope="module")
def booted():
    for program in ("systemd-nspawn", "mmdebstrap", "nsenter"):
        if not shutil.which(program):
            pytest.skip(program + " is not installed")
    make_tree()
    machine = Machine()
    yield machine
    machine.stop()


@pytest.fixture
def machine(booted):
    """The machine with the service installed and running on port 8080."""
    assert booted.install().returncode == 0
    assert booted.run(START).returncode == 0
    yield booted
    booted.run("umount -l /var/lib/co2d/remote_data; systemctl unmask co2d.socket; make -s -C /src uninstall; userdel co2d;"
               "rm -rf /etc/co2d.conf /var/lib/co2d /etc/systemd/system/co2d* /srv/*; systemctl daemon-reload; systemctl reset-failed")


def test_an_installation_makes_user_directories_and_a_service_that_answers(machine):
    assert machine.says(STATE) == "active\nactive\n"
    assert machine.says("curl -s localhost:8080/") == '"Hello world!"\n'
    assert machine.says("stat -c '%A %U:%G' /etc/co2d.conf /var/lib/co2d/remote_data") == (
        "-rw-r----- root:co2d\ndrwxr-x--- co2d:co2d\n")
    assert "co2d: co2d 1.0.0 listens on" in machine.says("journalctl -t co2d --no-pager -o cat -n 50").replace("co2d 1", "co2d: co2d 1")
    assert machine.says("co2d backup /root/copy && co2d --version | head -1").startswith("backup: ")
    assert machine.says("systemctl show -p TasksMax -p MemoryMax co2d") != ""


def test_root_publishes_from_its_own_directory_what_the_daemon_offers_and_strangers_are_told_who_can(machine):
    script = """
    curl -s -o /dev/null -X POST 'localhost:8080/ou/co2unit-30aea42a50bc/alive?site_code=n'
    umask 077; mkdir -p /root/new/flash; echo new > /root/new/flash/main.py
    co2d publish n /root/new --name update-1
    curl -s localhost:8080/ou/co2unit-30aea42a50bc/updates/update-1/flash/main.py
    stat -c '%A %U' /var/lib/co2d/remote_data/co2unit-30aea42a50bc/updates/update-1/flash/main.py
    runuser -u nobody -- co2d publish --list; echo $?
    """
    assert machine.says(script) == """\
co2unit-30aea42a50bc: update-1 published, 1 files
new
-rw-r----- co2d
co2d: /etc/co2d.conf: only root and its group may read it, as it can hold a secret: call this with sudo
78
"""


def test_installing_again_is_the_upgrade_and_a_restart_refuses_nobody(machine):
    script = """
    (while [ ! -e /tmp/enough ]; do curl -s -o /dev/null -w '%{http_code}\\n' -X POST localhost:8080/ou/co2unit-1/alive; done) > /tmp/codes &
    for round in 1 2 3; do make -s -C /src install >> /tmp/said 2>&1 || echo it failed >> /tmp/said; done
    touch /tmp/enough; wait; rm /tmp/enough; cat /tmp/codes
    """
    codes = machine.says(script).split()
    said = machine.says("cat /tmp/said")
    assert set(codes) == {"200"} and len(codes) > 20, said
    assert "it failed" not in said, said


def test_a_faulty_configuration_changes_nothing_and_is_named(machine):
    machine.run("echo prot = 1 >> /etc/co2d.conf")
    before = machine.says("md5sum /usr/local/lib/systemd/system/* /usr/local/lib/co2d/*.py")
    done = machine.install()
    assert done.returncode != 0 and "/etc/co2d.conf:" in done.stdout and "unknown setting 'prot'" in done.stdout
    assert "make install: nothing was changed" in done.stdout
    assert machine.says("md5sum /usr/local/lib/systemd/system/* /usr/local/lib/co2d/*.py") == before
    assert machine.says("ls /usr/local/lib /etc/co2d.conf*").split() == ["/etc/co2d.conf", "/usr/local/lib:", "co2d", "python3.11", "systemd"]


def test_a_python_that_the_service_s_user_cannot_run_is_not_used(machine):
    script = """
    mkdir -p -m 700 /root/own && cp /usr/bin/python3.11 /root/own/python3 && make -s -C /src install PYTHON=/root/own/python3
    grep -c ExecStart=/usr/bin/python3 /usr/local/lib/systemd/system/co2d.service
    """
    assert machine.says(script).endswith("runs with /usr/bin/python3; its configuration is /etc/co2d.conf\n1\n")


def test_directories_that_belong_to_another_user_are_refused_with_the_remedy(machine):
    machine.run("mkdir -p /srv/co2 && echo data_dir = /srv/co2 | sed -i '/^data_dir/d; /^.co2d.$/r /dev/stdin' /etc/co2d.conf")
    done = machine.install()
    assert done.returncode != 0 and "the user co2d may not write /srv/co2: chown -R co2d:co2d /srv/co2" in done.stdout


def test_after_a_faulty_start_with_a_client_waiting_one_restart_brings_the_socket_back(machine):
    machine.run("echo prot = 1 >> /etc/co2d.conf; systemctl restart co2d.service; curl -sm 1 localhost:8080/; curl -sm 1 localhost:8080/")
    assert machine.says("sleep 1; " + STATE) == "failed\nfailed\n"
    machine.run("sed -i /^prot/d /etc/co2d.conf; systemctl reset-failed; systemctl restart co2d.service")
    assert machine.says(STATE) == "active\nactive\n"
    assert machine.says("curl -s localhost:8080/") == '"Hello world!"\n'


def test_another_port_a_low_one_too_takes_effect_by_installing_again(machine):
    machine.run("sed -i 's/^#port.*/port = 80/' /etc/co2d.conf")
    assert machine.install().returncode == 0
    assert machine.says("curl -s localhost:80/; curl -sm 1 localhost:8080/; " + STATE) == '"Hello world!"\nactive\nactive\n'


def test_a_low_port_can_be_had_without_the_socket_as_well(machine):
    machine.run("sed -i 's/^#port.*/port = 80/' /etc/co2d.conf")
    machine.install()
    machine.run("sed -i /Requires=/d /usr/local/lib/systemd/system/co2d.service; systemctl daemon-reload;"
                "systemctl stop co2d.socket co2d.service; systemctl mask co2d.socket; systemctl start co2d.service")
    assert machine.says("curl -s localhost:80/; " + STATE) == '"Hello world!"\nactive\ninactive\n'


def test_a_reload_needs_no_other_program(machine):
    machine.run("sed -i 's/^#max_units.*/max_units = 5/' /etc/co2d.conf; mv /bin/kill /bin/kill.away")
    assert machine.run("systemctl reload co2d; mv /bin/kill.away /bin/kill; sleep 1").returncode == 0
    assert "reloaded" in machine.journal()


@pytest.mark.parametrize("fault", ["dd if=/dev/zero of=/var/lib/co2d/remote_data/full bs=64k", "mount -o remount,ro /var/lib/co2d/remote_data"])
def test_a_disk_that_is_full_or_read_only_does_not_get_the_daemon_killed(machine, fault):
    machine.run("mkdir -p /etc/systemd/system/co2d.service.d; printf '[Service]\\nWatchdogSec=2\\n' > /etc/systemd/system/co2d.service.d/x.conf;"
                "systemctl daemon-reload; systemctl stop co2d.socket;"
                "mount -t tmpfs -o size=1m,uid=$(id -u co2d),gid=$(id -g co2d) none /var/lib/co2d/remote_data; systemctl start co2d.service")
    pid = machine.says("systemctl show -p MainPID --value co2d")
    machine.run(fault + "; sleep 6")
    assert machine.says("systemctl show -p MainPID --value co2d") == pid
    assert "uploads cannot be stored" in machine.says("curl -s localhost:8080/readyz")
    assert machine.says("curl -s -o /dev/null -w '%{http_code}' -X POST localhost:8080/ou/co2unit-1/alive") == "200"


def test_a_directory_that_is_missing_is_named_and_made_by_installing_again(machine):
    machine.run("sed -i 's|^data_dir.*|data_dir = /srv/none/data|' /etc/co2d.conf; systemctl restart co2d.service; sleep 1")
    assert "cannot start: [Errno 30] Read-only file system: '/srv/none'; make the directories" in machine.journal()
    assert machine.install().returncode == 0
    assert machine.says(STATE) == "active\nactive\n"


def test_uninstalling_stops_it_and_leaves_data_and_configuration(machine):
    machine.run("curl -s -X POST localhost:8080/ou/co2unit-1/alive; make -s -C /src uninstall")
    assert machine.says(STATE) == "inactive\ninactive\n"
    assert machine.says("ls /usr/local/bin; cat /var/lib/co2d/var/pings/pings-0000.tsv | wc -l; test -e /etc/co2d.conf && echo kept") == "1\nkept\n"
