"""co2d as a process: signals, systemd, TLS, installation, backup. Each test runs the real daemon."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import co2d
import fipy
import importer

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CO2D = os.path.join(PROJECT, "co2d.py")


class Daemon:
    """co2d in a directory of its own; `log` is what it has said so far."""

    def __init__(self, directory, *options, command=(), pass_fds=(), **environ):
        self.directory = str(directory)
        self.data, self.var = os.path.join(self.directory, "data"), os.path.join(self.directory, "var")
        self.process = subprocess.Popen(
            [*command, sys.executable, CO2D, "--listen", "127.0.0.1", "--port", "0", "--data-dir", self.data, "--var-dir", self.var,
             *options], stderr=subprocess.PIPE, universal_newlines=True, env={**os.environ, "CO2D_CONF": os.devnull, **environ},
            pass_fds=pass_fds)
        self.lines = []
        self.news = threading.Condition()                       # guards lines
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.ready.wait(20), self.log
        self.port = int(re.search(r"listens on [^ ]*:([0-9]+)", self.log)[1])

    def _read(self):
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line)
                self.news.notify_all()
            if "listens on" in line:
                self.ready.set()
        self.ready.set()

    @property
    def log(self):
        return "".join(self.lines)

    def waits_for(self, pattern, seconds=10):
        with self.news:
            assert self.news.wait_for(lambda: re.search(pattern, self.log), seconds), self.log

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path):
    started = []

    def make(*options, **more):
        started.append(Daemon(tmp_path, *options, **more))
        return started[-1]

    yield make
    for one in started:
        one.process.kill()
        one.process.wait()


def ask(port, request):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(request)
        return read_all(sock)


def read_all(sock):
    received = b""
    while True:
        data = sock.recv(65536)
        if not data:
            return received
        received += data


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


PING = b"POST /ou/co2unit-1/alive?site_code=x HTTP/1.0\r\n\r\n"

# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_request_is_finished_before_the_daemon_ends_well(start, number):
    one = start()
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as sock:
        sock.sendall(b"PUT /ou/co2unit-1/push-sequential/data/x.tsv?offset=0 HTTP/1.0\r\nContent-Length: 5\r\n\r\nhe")
        ask(one.port, PING)                                     # who comes later is answered: the first is being served
        one.process.send_signal(number)
        one.waits_for("stopping")
        sock.sendall(b"llo")
        assert read_all(sock).startswith(b"HTTP/1.1 200 OK")
    assert one.process.wait(30) == 0
    assert "Traceback" not in one.log


def test_signals_that_come_at_any_moment_are_heeded(start, tmp_path):
    one = start()
    for _ in range(400):
        one.process.send_signal(signal.SIGHUP)
        assert ask(one.port, PING).startswith(b"HTTP/1.1 200 ")
    assert one.stop() == 0
    assert "Traceback" not in one.log


@pytest.fixture
def idle(tmp_path):
    """A daemon in this process that does not run."""
    (tmp_path / "co2d.conf").write_text("[co2d]\nlisten = 127.0.0.1\nport = 0\n")
    arguments = co2d.make_parser().parse_args(["--config", str(tmp_path / "co2d.conf"), "--data-dir", str(tmp_path / "data"),
                                               "--var-dir", str(tmp_path / "var")])
    daemon = co2d.Daemon(co2d.settings_of(arguments), arguments)
    yield daemon
    daemon.server.socket.close()
    for held in daemon.claims:
        os.close(held)


def test_a_directory_that_is_gone_does_not_end_the_daemon(idle, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(co2d.os, "getcwd", lambda: os.stat(str(tmp_path / "gone")))
    idle.reload()
    assert "reload refused" in caplog.text


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit is not installed")
def test_threads_leave_descriptors_for_the_files(start):
    one = start(command=["prlimit", "--nofile=64:64"])
    silent = [socket.create_connection(("127.0.0.1", one.port), timeout=20) for _ in range(100)]
    assert ask(one.port, PING).startswith(b"HTTP/1.1 200 ")
    put = b"PUT /ou/co2unit-1/push-sequential/data/x.tsv?offset=0 HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello"
    assert ask(one.port, put).startswith(b"HTTP/1.1 200 ")
    [sock.close() for sock in silent]


def test_a_taken_port_is_one_clear_line(start, tmp_path):
    one = start()
    done = subprocess.run([sys.executable, CO2D, "--listen", "127.0.0.1", "--port", str(one.port), "--data-dir", str(tmp_path / "other"),
                           "--var-dir", str(tmp_path / "others")], stderr=subprocess.PIPE, universal_newlines=True, timeout=30)
    assert done.returncode == 1 and done.stderr.startswith("co2d: cannot start: [Errno 98] Address already in use"), done.stderr
    assert "('127.0.0.1', %d)" % one.port in done.stderr and done.stderr.count("\n") == 1


def test_a_second_daemon_on_the_same_data_is_refused(start):
    one = start()
    done = subprocess.run([sys.executable, CO2D, "--listen", "127.0.0.1", "--port", "0", "--data-dir", one.data,
                           "--var-dir", one.var], stderr=subprocess.PIPE, universal_newlines=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "co2d: cannot start: [Errno 16] another co2d uses it: %r\n" % one.data)


def test_a_second_daemon_that_would_write_the_same_pings_and_database_is_refused(start, tmp_path):
    one = start()
    done = subprocess.run([sys.executable, CO2D, "--listen", "127.0.0.1", "--port", "0", "--data-dir", str(tmp_path / "other"),
                           "--var-dir", one.var], stderr=subprocess.PIPE, universal_newlines=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "co2d: cannot start: [Errno 16] another co2d uses it: %r\n" % one.var)


def test_a_reload_takes_new_limits_and_keeps_the_old_ones_when_the_file_is_bad(start, tmp_path):
    config = tmp_path / "co2d.conf"
    config.write_text("[co2d]\nunits = nobody\n")
    one = start("--config", str(config))
    assert b" 403 " in ask(one.port, PING)[:15]
    config.write_text("[co2d]\nunits = *\nport = 1\n")
    one.process.send_signal(signal.SIGHUP)
    one.waits_for("reloaded")
    assert b" 200 " in ask(one.port, PING)[:15]
    config.write_text("[co2d]\nunit = x\n")
    one.process.send_signal(signal.SIGHUP)
    one.waits_for(r"reload refused, the old settings stay: .*co2d\.conf:2: unknown setting 'unit'")
    assert b" 200 " in ask(one.port, PING)[:15]


def test_a_reload_takes_new_limits_of_the_quality_rules(start, tmp_path):
    config = tmp_path / "co2d.conf"
    config.write_text("[quality]\nco2_high = 40000\n")
    one = start("--config", str(config), "--import-delay", "0.1")

    def asked(query):
        with contextlib.suppress(importer.NoDatabase):          # the first import is still to come
            with importer.open_db(os.path.join(one.var, "db.sqlite3")) as db:
                return db.execute(query).fetchall()
        return []

    def waits(query, expected):
        end = time.monotonic() + 20
        while asked(query) != expected and time.monotonic() < end:
            pass
        assert asked(query) == expected
    waits("SELECT count(*) FROM last_import", [(1,)])           # it has the old limits, and could take the line that is to come
    config.write_text("[quality]\nco2_high = 500\n")
    one.process.send_signal(signal.SIGHUP)
    one.waits_for("reloaded")
    line = b"co2unit-1\tn\t2019-09-12\t00:30:00\t1.0\t0" + b"\t600" * 10 + b"\n"
    assert b" 200 " in ask(one.port, b"PUT /ou/co2unit-1/push-sequential/data/readings/readings-0000.tsv?offset=0 HTTP/1.0\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(line) + line)[:15]
    waits("SELECT co2_flag FROM co2_readings", [(4,)])


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host, seen", [("127.0.0.1", 200), ("::1", 403)])
def test_both_families_come_in_by_one_socket_and_are_told_apart(start, host, seen):
    one = start("--listen", "::", "--status-allow", "127.0.0.0/8")
    one.waits_for(r"listens on \[::\]:%d, " % one.port)
    for request, status in ((PING, 200), (b"GET /status/alive/summary HTTP/1.0\r\nAccept: text/html\r\n\r\n", seen)):
        with socket.create_connection((host, one.port), timeout=20) as sock:
            sock.sendall(request)
            assert read_all(sock).startswith(b"HTTP/1.1 %d " % status)


# -- systemd ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path):
    """What listens at NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        yield listener


def test_systemd_hears_of_start_reload_watchdog_and_stop(start, systemd):
    one = start(NOTIFY_SOCKET=systemd.getsockname(), WATCHDOG_USEC="2000000")
    assert systemd.recv(1000).startswith(b"READY=1\nSTATUS=listens on port ")
    assert systemd.recv(1000) == b"WATCHDOG=1"
    one.process.send_signal(signal.SIGHUP)
    heard = [systemd.recv(1000) for _ in range(6)]
    assert any(message.startswith(b"RELOADING=1\nMONOTONIC_USEC=") for message in heard) and b"READY=1" in heard
    one.process.send_signal(signal.SIGTERM)
    while heard[-1] != b"STOPPING=1":
        heard.append(systemd.recv(1000))


def test_a_daemon_that_nobody_listens_to_serves_all_the_same(start, tmp_path):
    one = start(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    assert ask(one.port, PING).startswith(b"HTTP/1.1 200 ")
    assert one.stop() == 0


def test_a_disk_that_takes_nothing_is_told_and_does_not_have_the_daemon_killed(start, systemd):
    one = start(NOTIFY_SOCKET=systemd.getsockname(), WATCHDOG_USEC="1000000")
    os.rename(one.data, one.data + ".gone")
    open(one.data, "w").close()
    assert b"uploads cannot be stored: [Errno 20]" in ask(one.port, b"GET /readyz HTTP/1.0\r\n\r\n")
    one.waits_for("uploads cannot be stored: ")
    heard = [systemd.recv(1000) for _ in range(5)]
    assert heard[-1] == b"WATCHDOG=1"


def test_with_socket_activation_a_restart_under_load_refuses_nobody(start):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    port, fd, replies, stop = listener.getsockname()[1], listener.fileno(), [], threading.Event()
    counted = threading.Semaphore(0)                            # replies that have not been waited for
    systemd = [sys.executable, "-c", "import os, sys; os.dup2(%d, 3); os.environ.update(LISTEN_PID=str(os.getpid()), "
               "LISTEN_FDS='1'); os.execv(sys.argv[1], sys.argv[1:])" % fd]

    def client():
        while not stop.is_set():
            replies.append(ask(port, PING)[:15])
            counted.release()

    one = start("--quiet", "yes", command=systemd, pass_fds=[fd])
    clients = [threading.Thread(target=client) for _ in range(6)]
    [thread.start() for thread in clients]
    for _ in range(2):
        [counted.acquire() for _ in range(len(replies) + 50)]
        assert one.stop() == 0
        one = start("--quiet", "yes", command=systemd, pass_fds=[fd])
    [counted.acquire() for _ in range(50)]
    stop.set()
    [thread.join() for thread in clients]
    listener.close()
    assert set(replies) == {b"HTTP/1.1 200 OK"} and len(replies) > 50


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_the_unit_is_hardened(tmp_path):
    unit = tmp_path / "co2d.service"
    unit.write_text(subprocess.run([sys.executable, CO2D, "--print-unit"], stdout=subprocess.PIPE, check=True,
                                   universal_newlines=True).stdout)
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    found = re.search(r"Overall exposure level for co2d.service: ([0-9.]+)", done.stdout)
    if not found:
        pytest.skip("this systemd-analyze cannot work offline")
    assert float(found[1]) <= 1.6


def test_paths_with_spaces_and_percent_signs_are_quoted_in_the_unit(monkeypatch):
    monkeypatch.setattr(co2d, "__file__", "/srv/field lab/co2d.py")
    monkeypatch.setattr(co2d.sys, "executable", "/usr/bin/python3")
    settings = importer.Settings()._replace(data_dir="/srv/100%/co2", var_dir='/srv/the "old" lab', db="/srv/x/db")
    unit = co2d.systemd_unit("service", settings, co2d.make_parser().parse_args(["--config", "/srv/$lab;1/co2d.conf"]))
    assert "\nExecStart=/usr/bin/python3 '/srv/field lab/co2d.py' --config '/srv/$$lab;1/co2d.conf'\n" in unit
    assert "\nReadWritePaths=-/srv/100%%/co2 '-/srv/the \"old\" lab' -/srv/x\n" in unit
    assert "\nRequiresMountsFor=/srv/100%%/co2 '/srv/the \"old\" lab' /srv/x\n" in unit


@pytest.mark.parametrize("data, home", [("/var/lib/co2d/data", "true"), ("/home/lab/data", "read-only")])
def test_the_unit_hides_homes_unless_something_of_ours_is_there(data, home, monkeypatch):
    monkeypatch.setattr(co2d, "__file__", "/usr/lib/co2d/co2d.py")
    monkeypatch.setattr(co2d.sys, "executable", "/usr/bin/python3")
    settings = importer.Settings()._replace(data_dir=data, var_dir="/var/lib/co2d/var")
    assert "\nProtectHome=%s\n" % home in co2d.systemd_unit("service", settings, co2d.make_parser().parse_args([]))


@pytest.mark.parametrize("db, directories", [("/v/db.sqlite3", "-/d -/v"), ("/srv/db/db.sqlite3", "-/d -/v -/srv/db")])
def test_the_unit_may_write_wherever_the_daemon_does(db, directories):
    settings = importer.Settings()._replace(data_dir="/d", var_dir="/v", db=db)
    unit = co2d.systemd_unit("service", settings, co2d.make_parser().parse_args([]))
    assert "\nReadWritePaths=%s\n" % directories in unit


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    return make_certificate(tmp_path, "localhost")


def make_certificate(directory, name):
    key, cert = str(directory / "key.pem"), str(directory / "cert.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
                    "-subj", "/CN=" + name], check=True, stderr=subprocess.DEVNULL)
    return ["--tls-cert", cert, "--tls-key", key]


def test_a_unit_syncs_over_tls_while_silent_clients_hold_nobody(start, certificate, tmp_path):
    one = start(*certificate)
    silent = [socket.create_connection(("127.0.0.1", one.port)) for _ in range(20)]
    unit = fipy.Unit("co2unit-1", str(tmp_path / "card"), ["https://127.0.0.1:%d" % one.port])
    unit.measure(days=2)
    session = unit.sync()
    assert session.error is None and session.finished
    [sock.close() for sock in silent]
    assert ask(one.port, PING).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("request_line, status", [(b"GET / HTTP/1.0", b"200"), (b"GET /nothing HTTP/1.0", b"404")])
def test_a_reply_over_tls_ends_with_a_farewell(start, certificate, request_line, status):
    context = ssl._create_unverified_context()
    with socket.create_connection(("127.0.0.1", start(*certificate).port), timeout=20) as sock:
        with context.wrap_socket(sock, suppress_ragged_eofs=False) as link:
            link.sendall(request_line + b"\r\n\r\n")
            assert read_all(link).split()[1] == status          # SSLEOFError where the farewell is missing


def test_a_renewed_certificate_is_taken_by_a_reload_and_one_that_cannot_be_used_is_not(start, certificate, tmp_path):
    def served():
        return ssl.get_server_certificate(("127.0.0.1", one.port))

    def renew():
        subprocess.run(["openssl", "req", "-x509", "-key", key, "-out", cert, "-days", "3", "-subj", "/CN=renewed"], check=True)

    one, cert, key = start(*certificate), certificate[1], certificate[3]
    before = served()
    renew()
    one.process.send_signal(signal.SIGHUP)
    one.waits_for("reloaded")
    after = served()
    assert after != before
    with open(cert, "w") as file:
        file.write("no certificate")
    one.process.send_signal(signal.SIGHUP)
    one.waits_for("reload refused, the old settings stay: tls_cert .*: ")
    assert served() == after


def test_a_key_without_a_certificate_is_not_taken_for_tls(tmp_path):
    done = subprocess.run([sys.executable, CO2D, "--check-config", "--tls-key", str(tmp_path / "key.pem")], stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=30)
    assert (done.returncode, done.stderr) == (78, "co2d: the options: tls_key without tls_cert: there would be no TLS\n")


@pytest.mark.parametrize("arguments", [[], ["--check-config"]])
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_certificate_that_cannot_be_used_is_named_and_stops_the_start(tmp_path, arguments, content):
    file = tmp_path / "cert.pem"
    if content is not None:
        file.write_text(content)
    done = subprocess.run([sys.executable, CO2D, "--port", "0", "--data-dir", str(tmp_path / "data"), "--var-dir", str(tmp_path / "var"),
                           "--tls-cert", str(file), *arguments], stderr=subprocess.PIPE, universal_newlines=True, timeout=30)
    assert done.returncode == 78 and done.stderr.startswith("co2d: tls_cert %s" % file) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("tls_only", ["yes", "no"])
def test_a_client_that_pauses_is_waited_for_on_the_tls_port_too(start, certificate, tls_only):
    one = start(*certificate, "--tls-only", tls_only)
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as sock:
        ask(one.port, PING)                                     # this one is served before it has said anything
        link = ssl._create_unverified_context().wrap_socket(sock) if tls_only == "yes" else sock
        for piece in (PING[:9], PING[9:]):
            ask(one.port, PING)
            link.sendall(piece)
        assert read_all(link).startswith(b"HTTP/1.1 200 ")
        link.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_versions_of_tls_before_1_2_are_refused(start, certificate):
    context = ssl._create_unverified_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", start(*certificate).port), timeout=20) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)


def test_plain_http_on_the_tls_port_can_be_allowed(start, certificate):
    assert ask(start(*certificate, "--tls-only", "no").port, PING).startswith(b"HTTP/1.1 200 ")


# -- logs -------------------------------------------------------------------------------------------------------------


def test_a_request_is_one_line_and_a_secret_is_in_none(start):
    one = start("--secret", "opensesame")
    ask(one.port, b"POST /opensesame/ou/co2unit-1/alive?site_code=a\xc2\x85b HTTP/1.0\r\n\r\n")
    ask(one.port, b"POST /opensesane/ou/co2unit-1/alive HTTP/1.0\r\n\r\n")
    socket.create_connection(("127.0.0.1", one.port)).close()
    one.waits_for('"POST /.*404')
    assert "opensesam" not in one.log and "opensesan" not in one.log and "Traceback" not in one.log
    one.waits_for(r"site_code=a\\x85b")


def test_a_full_pipe_in_place_of_a_log_stops_neither_pings_nor_a_stop(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen([sys.executable, CO2D, "--listen", "127.0.0.1", "--port", str(port), "--data-dir", str(tmp_path / "data"),
                                "--var-dir", str(tmp_path / "var")], stderr=subprocess.PIPE, env={**os.environ, "CO2D_CONF": os.devnull})
    try:
        process.stderr.readline()
        long_ping = PING.replace(b"=x", b"=" + b"x" * 5000)
        assert all(ask(port, long_ping).startswith(b"HTTP/1.1 200 ") for _ in range(50))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


# -- installation, backup ---------------------------------------------------------------------------------------------


def make(*arguments, cwd=PROJECT):
    return subprocess.run(["make", "-s", "PYTHON=" + sys.executable, *arguments], cwd=cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, env={**os.environ, "CO2D_CONF": os.devnull})


def test_install_puts_a_working_tree_in_place_and_uninstall_takes_it_away(tmp_path):
    root = str(tmp_path / "root")
    done = make("install", "DESTDIR=" + root)
    assert done.returncode == 0, done.stdout
    script, command = root + "/usr/local/lib/co2d/co2d.py", root + "/usr/local/bin/"
    version = subprocess.run([command + "co2d", "--version"], stdout=subprocess.PIPE, universal_newlines=True)
    assert version.stdout.startswith("co2d ")
    os.symlink(command + "plot_ascii", str(tmp_path / "link"))
    for arguments in ([command + "plot_ascii", "status"], [str(tmp_path / "link"), "status"], [command + "importer", "--help"]):
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, cwd=str(tmp_path),
                              env={**os.environ, "CO2D_CONF": os.devnull, "PYTHONVERBOSE": "1"})
        assert done.returncode == 0, done.stdout
        module = os.path.basename(arguments[0]).replace("link", "plot_ascii")
        for name in {module, "importer", "seqfile"}:
            assert re.search(r"code object from '.*/lib/co2d/__pycache__/%s\.|# .*/lib/co2d/__pycache__/%s\S* matches" % (name, name), done.stdout), name
    with open(root + "/usr/local/lib/systemd/system/co2d.service") as file:
        unit = file.read()
    assert "/usr/local/lib/co2d/co2d.py --config /etc/co2d.conf" in unit and root not in unit
    for directory in re.search("RequiresMountsFor=(.*)", unit)[1].split():
        assert directory.startswith("/var/lib/co2d/") and os.path.isdir(root + directory)
    assert make("uninstall", "DESTDIR=" + root).returncode == 0
    assert not os.path.exists(os.path.dirname(script)) and not os.listdir(command)
    assert os.path.exists(root + "/etc/co2d.conf")


def test_install_replaces_the_links_of_older_versions(tmp_path):
    root = str(tmp_path / "root")
    for name in ("lib/co2d", "bin"):
        os.makedirs("%s/usr/local/%s" % (root, name))
    os.symlink("../lib/co2d/importer.py", root + "/usr/local/bin/importer")
    assert make("install", "DESTDIR=" + root).returncode == 0
    with open(root + "/usr/local/lib/co2d/importer.py") as file, open(os.path.join(PROJECT, "importer.py")) as ours:
        assert file.read() == ours.read() and not os.path.islink(root + "/usr/local/bin/importer")


def run(*arguments, **environ):
    return subprocess.run([sys.executable, CO2D, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, env={**os.environ, **environ}, cwd="/")


def test_a_backup_of_a_running_station_is_restored_and_the_units_go_on(start, tmp_path):
    one = start()
    unit = fipy.Unit("co2unit-1", str(tmp_path / "card"), ["http://127.0.0.1:%d" % one.port])
    unit.measure(days=3)
    assert unit.sync().finished
    config, backup = tmp_path / "co2d.conf", tmp_path / "backup"
    config.write_text("[co2d]\ndata_dir = %s\nvar_dir = %s\n" % (one.data, one.var))
    done = run("backup", backup, CO2D_CONF=str(config))
    newest = time.strftime("%Y-%m-%dT", time.gmtime())
    assert re.match(r"backup: [0-9]+ files in %s, the newest of %s[0-9:]{8} UTC\n$" % (backup, newest), done.stdout), done
    assert (backup / "co2d.conf").read_text() == config.read_text()
    unit.measure(days=1)
    assert unit.sync().finished                                 # acknowledged after the backup, then the disk dies
    done = run("restore", backup, CO2D_CONF=str(config))
    assert (done.returncode, done.stdout) == (1, "") and "there are data already, as " in done.stderr
    assert one.stop() == 0
    shutil.rmtree(one.data)
    shutil.rmtree(one.var)
    assert run("restore", backup, CO2D_CONF=str(config)).stdout.startswith("restored: ")
    again = start()
    unit.urls = ["http://127.0.0.1:%d" % again.port]
    unit.measure(days=1)
    session = unit.sync()
    assert session.error is None and session.finished
    with open(os.path.join(again.data, "co2unit-1", "data", "readings", "readings-0000.tsv"), "rb") as file:
        assert file.read() == unit.read("readings-0000.tsv")


@pytest.fixture
def small_station(tmp_path):
    """Options for an archive of a few files, and the directories."""
    data, var = tmp_path / "data", tmp_path / "var"
    (data / "co2unit-1" / "data" / "readings").mkdir(parents=True)
    (data / "co2unit-1" / "data" / "readings" / "readings-0000.tsv").write_text("a\n")
    (var / "pings").mkdir(parents=True)
    (var / "pings" / "pings-0000.tsv").write_text("")
    return ["--data-dir", str(data), "--var-dir", str(var)], data, var


def test_a_second_backup_takes_what_has_changed_and_leaves_what_is_gone(small_station, tmp_path):
    options, data, _ = small_station
    assert co2d.main(["backup", str(tmp_path / "b"), *options]) == 0
    readings = data / "co2unit-1" / "data" / "readings"
    copy = tmp_path / "b" / "remote_data" / "co2unit-1" / "data" / "readings"
    before = (copy / "readings-0000.tsv").stat()
    (readings / "readings-0001.tsv").write_text("b\n")
    os.symlink("/etc/passwd", str(readings / "link"))
    assert co2d.main(["backup", str(tmp_path / "b"), *options]) == 0
    assert (copy / "readings-0000.tsv").stat().st_ino == before.st_ino
    (readings / "readings-0000.tsv").write_text("a\nb\n")
    (readings / "readings-0001.tsv").unlink()
    assert co2d.main(["backup", str(tmp_path / "b"), *options]) == 0
    assert {file.name: file.read_text() for file in copy.iterdir()} == {"readings-0000.tsv": "a\nb\n", "readings-0001.tsv": "b\n"}


@pytest.mark.parametrize("words, complaint", [
    (["backup", "BASE/b", "--data-dir", "BASE/none"], "there is no directory BASE/none: is this the configuration of the station?"),
    (["backup", "BASE/b", "--var-dir", "BASE/none"], "there is no directory BASE/none/pings: is this the configuration"),
    (["backup", "BASE/data/b"], "BASE/data/b lies within BASE/data"),
    (["restore", "BASE/var"], "BASE/var is no backup: there is no remote_data in it"),
])
def test_what_a_backup_lacks_is_an_error(small_station, tmp_path, capsys, words, complaint):
    command, *rest = [word.replace("BASE", str(tmp_path)) for word in words]
    assert co2d.main([command, *small_station[0], *rest]) == 1
    assert capsys.readouterr().err.startswith("co2d: " + complaint.replace("BASE", str(tmp_path)))


def test_what_cannot_be_copied_is_said_in_one_line(small_station, tmp_path, capsys):
    (tmp_path / "b" / "remote_data" / "co2unit-1" / "data" / "readings" / "readings-0000.tsv").mkdir(parents=True)
    assert co2d.main(["backup", str(tmp_path / "b"), *small_station[0]]) == 1
    said = capsys.readouterr().err
    assert said.startswith("co2d: 1 files could not be copied: [Errno 21] Is a directory: ") and said.count("\n") == 1


def test_what_cannot_be_copied_keeps_nothing_else_out_of_a_backup(small_station, tmp_path, capsys):
    options, data, _ = small_station
    os.mkfifo(str(data / "co2unit-1" / "pipe"))
    assert co2d.main(["backup", str(tmp_path / "b"), *options]) == 1
    assert "1 files could not be copied: " in capsys.readouterr().err
    assert (tmp_path / "b" / "var" / "pings" / "pings-0000.tsv").exists()


def test_a_backup_is_not_restored_under_a_running_daemon(start, small_station, tmp_path):
    assert co2d.main(["backup", str(tmp_path / "b"), *small_station[0]]) == 0
    shutil.rmtree(str(tmp_path / "data"))
    shutil.rmtree(str(tmp_path / "var"))
    start()
    done = run("restore", tmp_path / "b", *small_station[0])
    assert done.returncode == 1 and "another co2d uses it" in done.stderr


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", list(co2d.COMMANDS))
def test_every_command_has_a_help_that_ends_in_examples_and_a_version(command, tmp_path):
    os.symlink(CO2D, str(tmp_path / "station"))                 # the name that it was called by
    for words in (["--help"], ["--version"]):
        done = subprocess.run([sys.executable, str(tmp_path / "station"), command, *words], stdout=subprocess.PIPE,
                              universal_newlines=True, check=True)
        if words == ["--version"]:
            assert done.stdout == "co2d %s\n" % importer.__version__
        else:
            assert len(re.findall(r"^  .*station ", done.stdout.split("\nexamples:\n")[1], re.M)) >= 2, done.stdout


def test_the_help_names_the_commands():
    done = run("--help")
    for command in co2d.COMMANDS:
        assert re.search(rf"^  {command} +\w+", done.stdout, re.M)


def test_a_command_that_there_is_not_is_a_wrong_use():
    done = run("pubish", "--list")
    assert done.returncode == 2 and "no command is called 'pubish'; there are run, publish, backup, restore\n" in done.stderr


# -- replies that are cut short: a unit ignores Content-Length, so an orderly end would be the end of its file -----------

BIG = bytes(range(256)) * 4096 * 16                             # more than any socket's buffers hold


def begin_to_fetch(port, data, name="big.bin", context=None):
    """A client that asks for a big file, reads 1,000 bytes of it, and then no more for now."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", port))
    if context:
        sock = context.wrap_socket(sock, suppress_ragged_eofs=False)
    sock.sendall(b"GET /var/pub/%s HTTP/1.0\r\n\r\n" % name.encode())
    assert len(sock.recv(1000)) > 0
    return sock


def put_big_file(var, size=len(BIG)):
    os.makedirs(os.path.join(var, "pub"), exist_ok=True)
    with open(os.path.join(var, "pub", "big.bin"), "wb") as file:
        file.write(BIG[:size])


def assert_ends_in_an_error(sock):
    with sock, pytest.raises((ConnectionResetError, ssl.SSLError)):
        read_all(sock)


def cut_by_deadline(one):
    one.waits_for("dropped in its reply: reply took too long")


def cut_by_sigkill(one):
    one.process.kill()
    one.process.wait(20)


def cut_by_sigterm(one):
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(30) == 0


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("cut, seconds", [(cut_by_deadline, "1"), (cut_by_sigkill, "60"), (cut_by_sigterm, "2")])
def test_a_reply_that_is_cut_short_ends_in_a_reset(start, tmp_path, certificate, cut, seconds, tls):
    put_big_file(str(tmp_path / "var"))
    one = start("--request-seconds", seconds, *(certificate if tls else []))
    sock = begin_to_fetch(one.port, one.data, context=ssl._create_unverified_context() if tls else None)
    cut(one)
    assert_ends_in_an_error(sock)


def make_server(tmp_path, size=len(BIG)):
    settings = importer.Settings(listen="127.0.0.1", port=0, data_dir=str(tmp_path / "data"), var_dir=str(tmp_path / "var"),
                                 db=str(tmp_path / "db.sqlite3"))
    put_big_file(settings.var_dir, size)
    server = co2d.Server(co2d.Station(settings))
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    server.start()
    return server


def test_a_reply_that_is_dropped_to_serve_others_ends_in_a_reset(tmp_path, monkeypatch):
    server = make_server(tmp_path)
    sock = begin_to_fetch(server.port, None)
    server._most = 1                                            # no descriptor is left for the next
    fetching, = server._open
    others = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(co2d.WORKERS)]
    while fetching in server._open:
        time.sleep(0.01)
    assert_ends_in_an_error(sock)
    [other.close() for other in others]
    server.stop()


def test_a_reply_in_which_something_fails_ends_in_a_reset(tmp_path, monkeypatch):
    server = make_server(tmp_path)
    sock = begin_to_fetch(server.port, None)

    monkeypatch.setattr(co2d, "PIECE", "a bug")                 # reading the next piece raises TypeError
    assert_ends_in_an_error(sock)
    server.stop()


def test_a_reply_that_is_complete_ends_in_good_order_however_slowly_it_is_read(tmp_path):
    server = make_server(tmp_path, 1 << 20)                     # the socket takes 32 KiB of it
    with begin_to_fetch(server.port, None) as sock:
        assert len(ask(server.port, b"GET / HTTP/1.0\r\n\r\n")) > 0       # others have their turn, this one has to wait
        assert BIG.endswith(read_all(sock)[-1000:])
    server.stop()
