"""README.md as a program: its blocks, and a sandbox in which they run as they stand.

A block that begins with ```console is a dialogue: lines with a dollar sign are commands, the lines below one are what it
prints (``...`` stands for any lines; digits may differ). A block whose first line names a file (```json card/x.json) is that
file. A block of ```cron is a crontab. ``<!-- test: ... -->`` names what happens outside: a unit is switched on.

In the sandbox only names are replaced: paths of the system by a directory of its own, hosts by this machine, the port
by a free one. `sudo`, `systemctl`, `ssh` and others that would change the machine are stand-ins that check their
arguments.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Block(NamedTuple):
    """A fenced block, or a comment for the tests."""

    line: int                           # in README.md
    kind: str                           # console, cron, json ...; test for a comment
    path: str                           # the file that it is; "" for none
    text: str


_BLOCK = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$|^<!-- test: (.*?) -->$", re.M | re.S)


def blocks(text: str) -> list[Block]:
    """All blocks in order."""
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match[4]:
            found.append(Block(line, "test", "", match[4]))
        else:
            found.append(Block(line, match[1], match[2] or "", match[3]))
    return found


class Step(NamedTuple):
    """A command and what it is to print."""

    command: str
    expected: list[str]


def steps(block: Block) -> list[Step]:
    """The dialogue of a console block."""
    found: list[Step] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:], []))
        elif found[-1].command.endswith("\\") and not found[-1].expected:
            found[-1] = Step(found[-1].command + "\n" + line, [])
        else:
            found[-1].expected.append(line)
    return found


def agrees(printed: str, expected: list[str]) -> bool:
    """Whether a text is as README shows it, numbers aside."""
    pattern = "".join(r"(?:.*\n)*?" if line.strip() == "..." else _like(line) + r"\n" for line in expected)
    return re.fullmatch(pattern, printed if printed.endswith("\n") else printed + "\n") is not None


def _like(line: str) -> str:
    """A pattern for lines with the same words: digits and the width of gaps are free."""
    words = [".*" if word == "..." else re.sub(r"[0-9]+", "[0-9]+", re.escape(word)) for word in line.split()]
    return r"\s*" + r"\s+".join(words) + r"[ \t]*"


STAND_INS = {
    "sudo": """
if [ "$1" = -u ]; then [ "$2" = co2d ] || { echo "sudo: unknown user $2" >&2; exit 1; }; shift 2; fi
exec "$@"
""",
    "apt": """
[ "$1" = install ] && [ "$2" = -y ] || { echo "apt: unexpected: $*" >&2; exit 1; }
""",
    "usermod": """
[ "$1 $2" = "-aG co2d" ] || { echo "usermod: unexpected: $*" >&2; exit 1; }
""",
    "chown": """
[ $# -ge 2 ] || exit 1
""",
    "ssh": """
while [ "${1#-}" != "$1" ]; do case "$1" in -l) shift;; esac; shift; done
shift
exec sh -c "$*"
""",
    "systemctl": 'exec "@PYTHON@" "@THIS@" systemctl "$@"\n',
    "journalctl": """
[ "$1" = -u ] && [ "$2" = co2d ] || { echo "journalctl: unexpected: $*" >&2; exit 1; }
cat "@ROOT@/journal"
""",
}


def systemctl(root: str, arguments: list[str]) -> int:
    """A stand-in: starts and stops what the unit that was installed says."""
    verb, *rest = arguments
    units = [word for word in rest if not word.startswith("-")]
    unknown = {"co2d", "co2d.service", "co2d.socket"} - set(units) if not units else set(units) - {"co2d", "co2d.service", "co2d.socket"}
    if verb not in ("enable", "disable", "start", "stop", "restart", "reload", "daemon-reload", "is-active") or unknown:
        print("systemctl: unexpected: %s" % " ".join(arguments), file=sys.stderr)
        return 1
    if verb in ("stop", "restart", "disable"):
        _stop(root)
    if verb in ("start", "restart") or verb == "enable" and "--now" in rest:
        _start(root)
    if verb == "reload":
        _signal(root, signal.SIGHUP)
    return 0


def _pid_file(root: str) -> str:
    return os.path.join(root, "co2d.pid")


def _signal(root: str, number: int) -> bool:
    try:
        with open(_pid_file(root), encoding="ascii") as file:
            os.kill(int(file.read()), number)
        return True
    except (OSError, ValueError):
        return False


def _stop(root: str) -> None:
    if _signal(root, signal.SIGTERM):
        while _signal(root, 0):
            pass
        os.unlink(_pid_file(root))


def _start(root: str) -> None:
    with open(os.path.join(root, "usr/local/lib/systemd/system/co2d.service"), encoding="utf-8") as file:
        command = re.search(r"^ExecStart=(.*)$", file.read(), re.M)
    assert command, "no ExecStart"
    words = [inside(root, word) for word in command[1].split()]
    with open(os.path.join(root, "journal"), "ab") as journal:
        daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=journal, stderr=journal, start_new_session=True)
    with open(_pid_file(root), "w", encoding="ascii") as file:
        file.write(str(daemon.pid))
    while daemon.poll() is None and not _listens(root):
        time.sleep(0.02)


def _listens(root: str) -> bool:
    """Type=notify: systemctl waits until the daemon says so."""
    with open(os.path.join(root, "journal"), encoding="utf-8", errors="replace") as file:
        return " listens on " in file.read()


SYSTEM = ("/etc/co2d", "/var/lib/co2d", "/usr/local", "/mnt/", "/srv/")


def inside(root: str, text: str) -> str:
    """A text with the system's paths below the sandbox."""
    for path in SYSTEM:
        text = re.sub(r"(?<![\w.])" + re.escape(path), root + path, text)
    return text


class Sandbox:
    """A machine of its own, as far as README goes; `port` is where its station listens."""

    def __init__(self, root: str, port: int) -> None:
        self.root, self.port = root, port
        with socket.socket() as sock:                           # of the station that is tried without root
            sock.bind(("127.0.0.1", 0))
            self.trial = sock.getsockname()[1]
        self.source = os.path.join(root, "co2d")
        self.home = os.path.join(root, "home")
        self.bin = os.path.join(root, "stand-ins")
        for directory in (self.home, self.bin, os.path.join(root, "mnt")):
            os.makedirs(directory)
        names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout
        for name in names.splitlines():
            target = os.path.join(self.source, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy2(os.path.join(PROJECT, name), target)
        for name, script in STAND_INS.items():
            self.write(os.path.join(self.bin, name), "#!/bin/sh\n" + self.named(script))
            os.chmod(os.path.join(self.bin, name), 0o755)

    def named(self, text: str) -> str:
        """A stand-in's script with its places filled in."""
        return text.replace("@ROOT@", self.root).replace("@PYTHON@", sys.executable).replace("@THIS@", os.path.abspath(__file__))

    def replaced(self, text: str) -> str:
        """A text of README with the names of this sandbox."""
        text = inside(self.root, text)
        text = re.sub(r"\b(lab\.example\.org|localhost|lab-[ab])(?=:8080)", "127.0.0.1", text)
        return text.replace(":8080", ":%d" % self.port).replace("8081", str(self.trial))

    def shown(self, text: str) -> str:
        """What was printed, with the names of README."""
        text = text.replace(self.root, "").replace(":%d" % self.port, ":8080")
        return text.replace("127.0.0.1:8080", "localhost:8080")

    def settle(self) -> None:
        """Let the configuration name this sandbox's directories and port, as `replaced` does for what README shows."""
        path = os.path.join(self.root, "etc/co2d.conf")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                text = inside(self.root, file.read())
            if "\nport = " not in text:
                text = text.replace("[co2d]\n", "[co2d]\nport = %d\n" % self.port)
            self.write(path, text)

    def write(self, path: str, text: str) -> None:
        """Put a file in place."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def environment(self) -> dict[str, str]:
        """For commands: stand-ins first, then what was installed."""
        path = [self.bin, os.path.join(self.root, "usr/local/bin"), os.path.dirname(sys.executable), os.environ["PATH"]]
        return {"PATH": ":".join(path), "HOME": self.home, "DESTDIR": self.root, "LC_ALL": "C.UTF-8", "TERM": "dumb",
                "CO2D_CONF": os.path.join(self.root, "etc/co2d.conf"), "RSYNC_RSH": "ssh",
                "PYTHON": sys.executable, "COLUMNS": "80", "LINES": "24", "CO2D_TEST_ROOT": self.root,
                **{name: value for name, value in os.environ.items() if name.startswith("PG")}}

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A command line, as its reader would type it."""
        self.settle()
        return subprocess.run(["bash", "-c", self.replaced(command)], cwd=self.source, env=self.environment(), timeout=120,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def close(self) -> None:
        """Stop what runs."""
        _stop(self.root)
        self.run("[ ! -f try/pid ] || kill $(cat try/pid)")


if __name__ == "__main__":
    sys.exit(systemctl(os.environ["CO2D_TEST_ROOT"], sys.argv[2:]))
