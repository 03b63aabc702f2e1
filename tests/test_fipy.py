"""The simulated unit against scripted replies: each row of PROTOCOL.md's table, updates, what ends a session."""

import json
import re
import shutil
import socketserver
import ssl
import subprocess
import threading

import pytest

import fipy

UNIT = "co2unit-30aea42a50bc"
PUSH = re.compile(r"/ou/%s/push-sequential/(.+)/([^/]+)\?offset=(\d+)$" % UNIT)
A, B, C = "readings-0000.tsv", "readings-0001.tsv", "readings-0002.tsv"


def reply(status=200, body=b"{}", headers=b""):
    """A reply as bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.0 %d Some Phrase\r\n%s\r\n" % (status, headers) + body


def ack(name, position, status=200):
    """A reply to a push with an ack."""
    return reply(status, {"ack_file": [name, position, position]})


class Script(socketserver.ThreadingTCPServer):
    """A server whose replies a test has written. Pushes without a line in `push` get an echo ack."""
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, alive=reply(), updates=None, push=(), forever=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server_address[1]
        self.alive, self.updates, self.push, self.forever = alive, updates or {}, list(push), forever
        self.heads, self.keep_open = [], threading.Event()

    def answer(self, method, target, length):
        """The reply to one request."""
        if method == "POST":
            return self.alive
        if method == "GET":
            return self.updates.get(target.split("/ou/%s/" % UNIT)[1], reply(404))
        if self.push or self.forever:
            return self.push.pop(0) if self.push else self.forever
        _, name, offset = PUSH.search(target).groups()
        return ack(name, int(offset) + length)


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        length = re.search(rb"Content-Length: (\d+)", head)
        body = self.rfile.read(int(length[1])) if length else b""
        self.server.heads.append(head.decode("utf-8"))
        method, target = re.match(r"(\w+) (.*) HTTP/1\.0\r\n", head.decode("utf-8")).groups()
        self.wfile.write(self.server.answer(method, target, len(body)))
        self.wfile.flush()
        if self.server.keep_open.is_set():
            self.rfile.read(1)                          # until the unit gives up


@pytest.fixture
def serve():
    """Starts scripted servers, and stops them."""
    servers = []

    def start(**script):
        server = Script(**script)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def unit(tmp_path):
    """A unit with three files, time for ten requests, and no server yet."""
    unit = fipy.Unit(UNIT, str(tmp_path / "card"), [], nickname="varanger-03", cost=30)
    for name, size in ((A, 5000), (B, 100), (C, 10)):
        unit.write(name, b"x" * size)
    return unit


def sync(unit, server):
    """One session with that server."""
    unit.urls = [server.url]
    return unit.sync()


def pushes(session):
    """(name, offset, length) of each chunk."""
    found = [PUSH.search(request.target).groups() for request in session.pushes]
    return [(name, int(offset), request.sent) for (_, name, offset), request in zip(found, session.pushes)]


WHOLE = [(A, 0, 4096), (A, 4096, 904), (B, 0, 100), (C, 0, 10)]

# -- what goes out ----------------------------------------------------------------------------------------------------


def test_a_session_is_ping_updates_errors_readings_in_byte_order(unit, serve):
    unit.write("errors-0000.txt", b"e", "errors")
    unit.write("empty-0000.tsv", b"")
    session = sync(unit, serve())
    assert [(request.method, request.target.replace("/ou/" + UNIT, "")) for request in session.requests] == [
        ("POST", "/alive?site_code=varanger-03&rssi_raw=8&rssi_dbm=-97&ber_raw=99"),
        ("GET", "/updates?recursive=False"),
        ("PUT", "/push-sequential/errors/errors-0000.txt?offset=0"),
        ("PUT", "/push-sequential/data/readings/readings-0000.tsv?offset=0"),
        ("PUT", "/push-sequential/data/readings/readings-0000.tsv?offset=4096"),
        ("PUT", "/push-sequential/data/readings/readings-0001.tsv?offset=0"),
        ("PUT", "/push-sequential/data/readings/readings-0002.tsv?offset=0")]
    assert session.error is None and session.finished and not session.over_time
    assert session.sent == 5111 and session.elapsed == 7 * 30


def test_requests_have_few_headers_and_go_out_in_small_pieces(unit, serve):
    server = serve()
    sync(unit, server)
    assert server.heads[1] == "GET /ou/co2unit-30aea42a50bc/updates?recursive=False HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
    assert server.heads[3].split("\r\n")[1:] == ["Host: 127.0.0.1", "Content-Length: 904", "", ""]
    assert len(fipy.segments("GET", "/", "host")) == 4 and len(fipy.segments("PUT", "/", "host", b"body")) == 6


def test_nothing_is_encoded(unit, serve):
    server = serve()
    unit.nickname = "vadsø roof"
    assert sync(unit, server).error is None
    assert "?site_code=vadsø roof&rssi_raw" in server.heads[0]


@pytest.mark.parametrize("rssi, expected", [(None, ""), ("None", "&rssi_raw=None&rssi_dbm=None&ber_raw=99"),
                                            (-113, "&rssi_raw=0&rssi_dbm=-113&ber_raw=99")])
def test_an_unknown_signal_is_left_out_or_none(unit, serve, rssi, expected):
    unit.rssi = rssi
    assert sync(unit, serve()).requests[0].target.endswith("?site_code=varanger-03" + expected)


def test_the_address_is_a_plain_prefix(unit, serve):
    server = serve()
    server.url += "/some/path"
    assert sync(unit, server).finished
    assert server.heads[0].startswith("POST /some/path/ou/co2unit-")


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_https_is_not_verified(unit, serve, tmp_path):
    pem = str(tmp_path / "pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", pem, "-out", pem + ".crt", "-subj", "/CN=nobody"], check=True, stderr=subprocess.DEVNULL)
    server = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem + ".crt", pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = server.url.replace("http:", "https:")
    session = sync(unit, server)
    assert session.error is None and session.finished


# -- the table of acks ------------------------------------------------------------------------------------------------


def test_after_echo_acks_only_what_is_new_is_sent(unit, serve):
    server = serve()
    assert pushes(sync(unit, server)) == WHOLE
    assert unit.position == (C, 10)
    unit.write(C, b"x" * 12)
    assert pushes(sync(unit, server)) == [(C, 10, 2)]


def test_an_empty_object_advances_by_what_was_sent(unit, serve):
    assert pushes(sync(unit, serve(forever=reply()))) == WHOLE


@pytest.mark.parametrize("body", [b"null", b"", b"<html>", b"[]", b'{"ack_file": ["readings-0000.tsv", 4096]}',
                                  b'{"ack_file": ["readings-0000.tsv", "4096", 0]}', b'{"ack_file": ["readings-0000'])
def test_a_200_with_a_body_it_cannot_read_is_an_exception_and_counts_as_sent(unit, serve, body):
    session = sync(unit, serve(push=[reply(body=body)]))
    assert session.error and not session.finished and pushes(session) == WHOLE[:1]
    assert pushes(sync(unit, serve())) == WHOLE[1:]


def test_a_smaller_position_of_the_same_file_is_where_it_resumes(unit, serve):
    assert pushes(sync(unit, serve(push=[ack(A, 1000)]))) == [(A, 0, 4096), (A, 1000, 4000)] + WHOLE[2:]


@pytest.mark.parametrize("status", [200, 416])
def test_an_older_file_at_0_is_sent_again_with_all_that_follow(unit, serve, status):
    unit.set_position("data/readings", B, 50)
    assert pushes(sync(unit, serve(push=[ack(A, 0, status)]))) == [(B, 50, 50)] + WHOLE


def test_an_ack_beyond_its_own_file_silences_it_until_the_file_outgrows_it(unit, serve):
    session = sync(unit, serve(push=[ack(C, 11)]))
    assert session.error.startswith("AssertionError") and pushes(session) == WHOLE[:1]
    for size in (10, 11):
        unit.write(C, b"x" * size)
        assert pushes(sync(unit, serve())) == []
    unit.write(C, b"x" * 15)
    assert pushes(sync(unit, serve())) == [(C, 11, 4)]


@pytest.mark.parametrize("answer", [reply(416), ack(A, 0, 416), ack(A, 0), ack("readings-0009.tsv", 0, 416)])
def test_the_same_push_is_repeated_without_pause_until_the_time_is_over(unit, serve, answer):
    for _ in range(2):
        session = sync(unit, serve(forever=answer))
        assert pushes(session) == [WHOLE[0]] * 8
        assert session.over_time and session.error is None and not session.finished


def test_300_seconds_make_room_for_428_requests(unit, serve):
    unit.cost = 0.7
    assert len(sync(unit, serve(forever=reply(416))).requests) == 428


def test_an_ack_of_a_strange_name_at_a_later_file_sends_it_to_its_first_file(unit, serve):
    unit.set_position("data/readings", B, 0)
    assert pushes(sync(unit, serve(push=[ack("readings-0009.tsv", 0)]))) == [WHOLE[2]] + WHOLE


def test_an_ack_of_a_strange_name_at_every_reply_is_an_endless_loop(unit, serve):
    session = sync(unit, serve(forever=ack("readings-0009.tsv", 0)))
    assert pushes(session) == (WHOLE[:3] * 3)[:8] and session.over_time


def test_an_ack_of_a_strange_name_at_the_first_file_changes_nothing(unit, serve):
    assert pushes(sync(unit, serve(push=[ack("readings-0009.tsv", 0)]))) == WHOLE


@pytest.mark.parametrize("status", [201, 204, 301, 400, 404, 500, 503])
def test_any_other_status_ends_the_session_and_nothing_is_lost(unit, serve, status):
    session = sync(unit, serve(push=[reply(status)]))
    assert session.error == "push: %d" % status and pushes(session) == WHOLE[:1]
    assert pushes(sync(unit, serve())) == WHOLE


def test_a_failure_in_errors_keeps_the_readings_back(unit, serve):
    unit.write("errors-0000.txt", b"e", "errors")
    assert len(sync(unit, serve(push=[reply(500)])).pushes) == 1


# -- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alive", [reply(201), reply(404), reply(500), reply(301, headers=b"Location: /\r\n"),
                                   reply(headers=b"Transfer-Encoding: chunked\r\n"), b"", b"garbage"])
def test_a_refused_ping_blocks_all_data(unit, serve, alive):
    session = sync(unit, serve(alive=alive))
    assert session.error and len(session.requests) == 1 and not session.finished


@pytest.mark.parametrize("listing", [reply(500), reply(body=b"{}"), reply(body=b"no json"), reply(body=[1])])
def test_a_refused_listing_of_updates_blocks_all_data(unit, serve, listing):
    session = sync(unit, serve(updates={"updates?recursive=False": listing}))
    assert session.error and len(session.requests) == 2


def test_content_length_is_ignored_and_a_reply_cut_short_is_complete(unit, serve):
    body = reply(body={"ack_file": [A, 4096, 0]}, headers=b"Content-Length: 3\r\n")
    assert pushes(sync(unit, serve(alive=b"HTTP/1.1 200 OK\r\nContent-Le", push=[body]))) == WHOLE


def test_a_connection_kept_open_hangs_it_until_the_watchdog(unit, serve):
    server = serve()
    server.keep_open.set()
    unit.watchdog = 0.1
    session = sync(unit, server)
    assert session.error.startswith("watchdog: POST") and len(session.requests) == 1


def test_no_server_at_all_is_an_error(unit, serve):
    unit.urls = ["http://127.0.0.1:9"]
    assert unit.sync().error.startswith("ConnectionRefusedError")


# -- updates ----------------------------------------------------------------------------------------------------------

UPDATES = {
    "updates?recursive=False": reply(body=["update-2020-01-14a", "update-2019-12-01a"]),
    "updates/update-2020-01-14a?recursive=True": reply(body=["flash/main.py", "flash/lib/a.py", "conf-patch/ou-id.json"]),
    "updates/update-2020-01-14a/flash/main.py": reply(body=b"print(1)\n"),
    "updates/update-2020-01-14a/flash/lib/a.py": reply(body=b""),
    "updates/update-2020-01-14a/conf-patch/ou-id.json": reply(body={"site_code": "varanger-04", "period": 900}),
}


def test_the_last_update_is_taken_once_and_then_a_new_round_begins(unit, serve):
    server = serve(updates=UPDATES)
    unit.budget = 900
    session = sync(unit, server)
    paths = [request.target.split(UNIT + "/")[1].split("?")[0] for request in session.requests]
    name = "updates/update-2020-01-14a"
    assert paths[:8] == ["alive", "updates", name, name + "/conf-patch/ou-id.json", name + "/flash/lib/a.py",
                         name + "/flash/main.py", "alive", "updates"]
    assert unit.flash == {"main.py": b"print(1)\n", "lib/a.py": b""} and session.finished
    assert unit.conf == {"ou-id.json": {"site_code": "varanger-04", "period": 900}}
    assert "site_code=varanger-04&" in session.requests[6].target
    assert len(sync(unit, server).requests) == 2


def test_a_patch_of_the_destination_counts_from_the_next_session(unit, serve):
    second = serve()
    patch = {"updates/update-2020-01-14a/conf-patch/ou-comm-config.json": reply(body={"sync_dest": [second.url]})}
    unit.budget = 900
    assert sync(unit, serve(updates={**UPDATES, **patch})).finished
    assert [request.url for request in unit.sync().requests] == [second.url] * 2


@pytest.mark.parametrize("listing", [reply(body=[]), reply(404), reply(body=b"text of a stray file"),
                                     reply(body=["flash/missing.py"])])
def test_an_update_that_cannot_be_taken_whole_fails_every_day_before_any_data(unit, serve, listing):
    server = serve(updates={"updates?recursive=False": reply(body=["update-1"]),
                            "updates/update-1?recursive=True": listing})
    for _ in range(2):
        session = sync(unit, server)
        assert session.error and not session.pushes


# -- card, state, several servers -------------------------------------------------------------------------------------


def test_the_position_is_on_the_card_for_another_day(unit, serve):
    assert sync(unit, serve()).finished
    again = fipy.Unit(UNIT, unit.card, unit.urls)
    assert again.sync().pushes == [] and again.position == (C, 10)


def test_without_its_state_it_sends_everything_again(unit, serve):
    assert sync(unit, serve()).finished
    unit.lose_state()
    assert pushes(sync(unit, serve())) == WHOLE


def test_a_fresh_card_has_neither_state_nor_updates(unit, serve):
    assert sync(unit, serve()).finished
    unit.swap_card({"readings-0003.tsv": b"new"})
    assert unit.position is None and list(unit.files()) == ["readings-0003.tsv"]
    assert pushes(sync(unit, serve())) == [("readings-0003.tsv", 0, 3)]


def test_the_second_server_sees_pings_but_no_data_unless_the_first_fails(unit, serve):
    first, second = serve(), serve()
    unit.budget, unit.urls = 900, [first.url, second.url]
    session = unit.sync()
    assert [request.url for request in session.pushes] == [first.url] * 4 and len(second.heads) == 2
    unit.lose_state()
    first.alive = reply(500)
    session = unit.sync()
    assert [request.url for request in session.pushes] == [second.url] * 4
    assert session.errors == ["alive: 500"] and session.finished


def test_time_that_ends_in_the_middle_goes_on_there_the_next_day(unit, serve):
    unit.cost = 70
    server = serve()
    assert [pushes(sync(unit, server)) for _ in range(2)] == [WHOLE[:2], WHOLE[2:]]


# -- measuring, fleet -------------------------------------------------------------------------------------------------


def test_measuring_writes_half_hourly_lines_and_starts_a_new_file_at_102400_bytes(unit):
    unit.swap_card()
    assert unit.measure(30) == 1440 and unit.now == fipy.FIRST_DAY + fipy.timedelta(days=30)
    first, second = unit.files().values()
    assert 102400 <= len(first) < 102400 + 120 and first.endswith(b"\n")
    lines = (first + second).decode().splitlines()
    assert len(lines) == 1440 and all(len(line.split("\t")) == 16 for line in lines)
    assert lines[1].split("\t")[:4] == [UNIT, "varanger-03", "2019-09-12", "00:30:00"]


def test_measuring_day_by_day_or_at_once_gives_the_same_days(unit, tmp_path):
    unit.swap_card()
    other = fipy.Unit(UNIT, str(tmp_path / "other"), [])
    for _ in range(3):
        unit.measure(1)
    other.measure(3)
    assert unit.read(A) == other.read(A)


def test_error_entries_come_in_both_date_formats(unit):
    unit.log_error("Signal quality", "WARN", as_tuple=True)
    unit.log_error("Uncaught exception", "EXC", "Traceback")
    assert unit.read("errors-0000.txt", "errors").decode() == (
        "----- (2019, 9, 12, 0, 0, 0, 3, 255) WARN Signal quality\n"
        "----- 2019-09-12 00:00:00 EXC Uncaught exception\nTraceback\n")


def test_failed_sessions_are_logged_when_wanted(unit, serve):
    unit.log_failures = True
    sync(unit, serve(alive=reply(500)))
    assert unit.read("errors-0000.txt", "errors").endswith(b"EXC Uncaught exception in transmitting\nalive: 500\n")


def test_the_command_runs_a_fleet_and_tells_whether_all_went_well(capsys):
    assert fipy.main(["--url", "http://127.0.0.1:9", "--units", "2", "--days", "1"]) == 1
    assert capsys.readouterr().out.startswith("2 units, 1 days: 2 requests, 0 chunks, 0 bytes")


def test_many_units_talk_at_the_same_time(serve, tmp_path):
    server = serve()
    server.answer = lambda method, target, length: reply(404 if method == "GET" else 200)
    units = fipy.make_units(12, str(tmp_path), [server.url])
    night = list(fipy.run_fleet(units, 1))[0]
    assert night.errors == [] and all(session.finished for session in night.sessions)
    assert night.chunks == 24 + 2 and night.sent == sum(len(data) for unit in units for directory in fipy.DIRECTORIES
                                                        for data in unit.files(directory).values())
