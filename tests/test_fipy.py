"""The simulated unit against scripted replies: each row of PROTOCOL.md's table, updates, what ends a session."""

import json
import os
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
        self.server.heads.append(head.decode("utf-8", "surrogateescape"))
        method, target = re.match(r"(\w+) (.*) HTTP/1\.0\r\n", head.decode("utf-8", "surrogateescape")).groups()
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
    """A unit with three files, time for ten requests (and an eleventh), and no server yet."""
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


@pytest.mark.parametrize("body", [b"[]", b'""', b'"Hello world!"'])
def test_a_list_or_a_text_is_a_reply_without_an_ack(unit, serve, body):
    assert pushes(sync(unit, serve(forever=reply(body=body)))) == WHOLE


@pytest.mark.parametrize("body", [b"null", b"5", b"", b"<html>", b'{"ack_file": ["readings-0000.tsv", 4096]}',
                                  b'{"ack_file": ["readings-0000.tsv", "4096", 0]}', b'{"ack_file": null}', b'{"ack_file": ["readings-0000'])
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
        assert pushes(session) == [WHOLE[0]] * 9
        assert session.over_time and session.error is None and not session.finished


def test_300_seconds_make_room_for_429_requests_of_700_ms(unit, serve):
    unit.cost = 0.7
    assert len(sync(unit, serve(forever=reply(416))).requests) == 429


def test_an_ack_of_a_strange_name_at_a_later_file_sends_it_to_its_first_file(unit, serve):
    unit.set_position("data/readings", B, 0)
    assert pushes(sync(unit, serve(push=[ack("readings-0009.tsv", 0)]))) == [WHOLE[2]] + WHOLE


def test_an_ack_of_a_strange_name_at_every_reply_is_an_endless_loop(unit, serve):
    session = sync(unit, serve(forever=ack("readings-0009.tsv", 0)))
    assert pushes(session) == WHOLE[:3] * 3 and session.over_time


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


@pytest.mark.parametrize("listing", [reply(404), reply(body=b"{}"), reply(body=b"[]"), reply(body=b"null"), reply(body=[""])])
def test_what_lists_nothing_is_no_update(unit, serve, listing):
    assert pushes(sync(unit, serve(updates={"updates?recursive=False": listing}))) == WHOLE


@pytest.mark.parametrize("listing", [reply(500), reply(body=b"no json"), reply(body=[1]), reply(body=5)])
def test_a_refused_listing_of_updates_blocks_all_data(unit, serve, listing):
    session = sync(unit, serve(updates={"updates?recursive=False": listing}))
    assert session.error and len(session.requests) == 2


def test_content_length_is_ignored_and_a_reply_cut_short_is_complete(unit, serve):
    body = reply(body={"ack_file": [A, 4096, 0]}, headers=b"Content-Length: 3\r\n")
    assert pushes(sync(unit, serve(alive=b"HTTP/1.1 200 OK\r\nContent-Le", push=[body]))) == WHOLE


def test_a_connection_kept_open_hangs_it_until_the_watchdog(unit, serve):
    server = serve()
    server.keep_open.set()
    unit.body_watchdog = 0.1
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
    assert paths[:8] == ["alive", "updates", name, name + "/flash/main.py", name + "/flash/lib/a.py",
                         name + "/conf-patch/ou-id.json", "alive", "updates"]
    assert unit.flash == {"main.py": b"print(1)\n", "lib/a.py": b""} and session.finished
    assert unit.conf("ou-id.json") == {"site_code": "varanger-04", "period": 900}
    assert "site_code=varanger-04&" in session.requests[6].target
    assert len(sync(unit, server).requests) == 2


def test_a_patch_of_the_destination_counts_in_the_same_night(unit, serve):
    second = serve()
    patch = {"updates/update-2020-01-14a/conf-patch/ou-comm-config.json": reply(body={"sync_dest": second.url})}
    listing = reply(body=["conf-patch/ou-comm-config.json"])
    first = serve(updates={**UPDATES, "updates/update-2020-01-14a?recursive=True": listing, **patch})
    session = sync(unit, first)
    assert [request.url for request in session.requests] == [first.url] * 4 + [second.url] * 6
    assert session.finished and unit.urls == [second.url]


@pytest.mark.parametrize("listing", [reply(body=[]), reply(404), reply(body=b"text of a stray file"),
                                     reply(body=["flash/missing.py"])])
def test_an_update_that_cannot_be_taken_whole_fails_every_day_before_any_data(unit, serve, listing):
    server = serve(updates={"updates?recursive=False": reply(body=["update-1"]),
                            "updates/update-1?recursive=True": listing})
    for _ in range(2):
        session = sync(unit, server)
        assert session.error and not session.pushes


def update(files, name="update-1", **replies):
    """The replies of a server that offers one update; `replies`: others, by the file's path with _ for / and .."""
    given = {"updates?recursive=False": reply(body=[name]), "updates/%s?recursive=True" % name: reply(body=list(files))}
    for path, content in files.items():
        given["updates/%s/%s" % (name, path)] = reply(body=content)
    return given


def gets(session):
    """What was asked for with GET."""
    return [request.target.split(UNIT + "/")[1] for request in session.requests if request.method == "GET"]


def test_a_file_that_is_cut_short_in_good_order_reaches_the_flash(unit, serve):
    cut = reply(body=b"half of i", headers=b"Content-Length: 1000\r\n")
    unit.budget = 900
    sync(unit, serve(updates={**update({"flash/main.py": b""}), "updates/update-1/flash/main.py": cut}))
    assert unit.flash == {"main.py": b"half of i"}


def test_what_came_over_in_an_earlier_night_is_not_fetched_again_whatever_it_is(unit, serve):
    offered = update({"flash/a.py": b"first", "flash/b.py": b"b", "flash/c.py": b"c"})
    server = serve(updates={**offered, "updates/update-1/flash/b.py": reply(503)})
    session = sync(unit, server)
    assert session.error == "update file: 503" and not session.pushes and unit.flash == {}
    server.updates.update({**offered, "updates/update-1/flash/a.py": reply(body=b"second")})
    assert gets(sync(unit, server))[1:4] == [
        "updates/update-1?recursive=True", "updates/update-1/flash/b.py", "updates/update-1/flash/c.py"]
    assert unit.flash == {"a.py": b"first", "b.py": b"b", "c.py": b"c"}


def test_a_name_is_used_once_for_each_card_whoever_offers_it_and_whatever_is_in_it(unit, serve):
    sync(unit, serve(updates=update({"flash/a.py": b"first"})))
    assert gets(sync(unit, serve(updates=update({"flash/a.py": b"second"})))) == ["updates?recursive=False"]
    unit.swap_card({A: b"new"})
    sync(unit, serve(updates=update({"flash/a.py": b"third"})))
    assert unit.flash == {"a.py": b"third"}


def test_the_last_update_on_the_card_is_installed_not_the_one_that_was_fetched(unit, serve):
    unit.write("main.py", b"later", "updates/update-9/flash")
    unit.sync()                                                 # there is no server: it is installed when it wakes
    assert unit.flash == {"main.py": b"later"}
    session = sync(unit, serve(updates=update({"flash/main.py": b"earlier"})))
    assert "updates/update-1/flash/main.py" in gets(session) and unit.flash == {"main.py": b"later"}
    assert not session.pushes                                   # nothing was installed, so it did not communicate again


def test_nothing_is_deleted_from_the_flash(unit, serve):
    unit.flash = {"x.mpy": b"old"}
    sync(unit, serve(updates=update({"flash/x.py": b"new"})))
    assert unit.flash == {"x.mpy": b"old", "x.py": b"new"}


@pytest.mark.parametrize("patch", [b"[1]", b"null", b"{", b"5"])
def test_a_patch_that_cannot_be_merged_breaks_the_install_at_every_wake_and_costs_a_night(unit, serve, patch):
    server = serve(updates=update({"conf-patch/ou-id.json": patch, "flash/main.py": b"new"}))
    assert sync(unit, server).pushes == [] and unit.nickname == "varanger-03"
    session = sync(unit, server)
    assert pushes(session) == WHOLE and session.error.startswith("install: ")
    unit.write("ou-id.json", b'{"site_code": "mended"}', "updates/update-1/conf-patch")
    assert sync(unit, server).error is None and unit.nickname == "mended"


def test_a_directory_among_the_patches_breaks_the_install(unit, serve):
    session = sync(unit, serve(updates=update({"conf-patch/more/ou-id.json": b"{}"})))
    assert session.error.startswith("install: IsADirectoryError") and not session.pushes


def test_patches_are_merged_at_the_top_level_only(unit, serve):
    unit.configure("ou-comm-config.json", ntp_host="a", other={"x": 1, "y": 2})
    sync(unit, serve(updates=update({"conf-patch/ou-comm-config.json": b'{"other": {"z": 3}}'})))
    assert unit.conf("ou-comm-config.json")["other"] == {"z": 3} and unit.conf("ou-comm-config.json")["ntp_host"] == "a"


def test_a_file_of_more_than_300_kB_is_not_through_before_the_watchdog_night_after_night(unit, serve):
    unit.rate = 2500                                            # bytes/s, as on CAT-M1
    server = serve(updates=update({"flash/a.bin": b"x" * 250_000, "flash/b.bin": b"x" * 310_000}))
    for fetched in (["updates/update-1/flash/a.bin", "updates/update-1/flash/b.bin"], ["updates/update-1/flash/b.bin"]):
        session = sync(unit, server)
        assert session.error == "watchdog: 310000 bytes at 2500 bytes/s" and not session.pushes
        assert gets(session)[2:] == fetched


def test_a_long_update_is_never_cut_short_but_leaves_no_time_for_data(unit, serve):
    unit.rate, unit.cost = 2500, 0.7
    server = serve(updates=update({"flash/%d" % number: b"x" * 200_000 for number in range(5)}))
    session = sync(unit, server)
    assert len(unit.flash) == 5 and session.over_time and session.pushes == [] and session.error is None
    assert pushes(sync(unit, server)) == WHOLE


# -- configuration ----------------------------------------------------------------------------------------------------


def test_a_unit_without_a_destination_never_communicates(unit):
    for nothing in (None, "", []):
        unit.configure("ou-comm-config.json", sync_dest=nothing)
        session = unit.sync()
        assert session.requests == [] and session.error == "communicate: no sync destination"


def test_a_slash_at_the_end_of_the_address_is_doubled_in_the_path(unit, serve):
    server = serve()
    unit.urls = [server.url + "/"]
    assert {request.target[:6] for request in unit.sync().requests} == {"//ou/c"}


def test_an_address_with_brackets_cannot_be_parsed(unit):
    unit.urls = ["http://[::1]:8080", "ftp://x"]
    session = unit.sync()
    assert [error[:10] for error in session.errors] == ["ValueError"] * 2 and session.requests == []


def test_the_id_of_the_hardware_can_be_overridden(unit, serve):
    unit.configure("ou-id.json", hw_id="co2unit-1", site_code=None)
    server = serve()
    sync(unit, server)
    assert server.heads[0].startswith("POST /ou/co2unit-1/alive?site_code=None&rssi_raw=8")


@pytest.mark.parametrize("size, expected", [(1000, [(A, 0, 1000), (A, 1000, 1000)]), (8192, [(A, 0, 5000), (B, 0, 100)])])
def test_the_size_of_chunks_is_configured(unit, serve, size, expected):
    unit.configure("ou-comm-config.json", send_chunk_size=size)
    assert pushes(sync(unit, serve()))[:2] == expected


@pytest.mark.parametrize("size", [-1, "4096", None, 1.5])
def test_a_size_of_chunks_that_is_none_is_an_exception_before_any_data(unit, serve, size):
    unit.configure("ou-comm-config.json", send_chunk_size=size)
    assert pushes(sync(unit, serve())) == []


def test_directories_are_served_in_the_order_of_the_configuration_and_an_unknown_way_ends_it(unit, serve):
    unit.write("errors-0000.txt", b"e", "errors")
    unit.configure("ou-comm-config.json", sync_dirs=[["data/readings", "push_sequential"], ["x", "sometimes"],
                                                     ["errors", "push_sequential"]])
    session = sync(unit, serve())
    assert pushes(session) == WHOLE and session.error == "NameError: unknown way 'sometimes'"


def test_a_power_on_pings_once_more_with_the_signal_of_the_session_before(unit, serve):
    server = serve()
    unit.urls = [server.url]
    unit.power_on()
    unit.rssi = -53
    session = unit.power_on()
    assert [request.target.partition("?")[2] for request in session.requests if request.method == "POST"] == [
        "site_code=varanger-03&rssi_raw=8&rssi_dbm=-97&ber_raw=99", "site_code=varanger-03&rssi_raw=30&rssi_dbm=-53&ber_raw=99"]
    assert server.heads[0].startswith("POST /ou/co2unit-30aea42a50bc/alive?site_code=varanger-03 HTTP/1.0")   # never measured


def test_the_budget_counts_from_before_the_attach(unit, serve):
    unit.attach = 260
    assert pushes(sync(unit, serve())) == []                    # 260 s and two requests of 30 s
    unit.attach = 240
    assert pushes(sync(unit, serve())) == WHOLE[:1]


# -- any file name ----------------------------------------------------------------------------------------------------


NAMES = ["._readings-0000.tsv", ".~lock.readings-0000.tsv#", "SYSTEM~1", "a\udcff", "readings-0000 (1).tsv", "readings-0000 - Copy.tsv",
         A, "readings-0000.tsv~", "readings-0000_old.tsv", B, "readings-0001.tsv.bak", C, "vadsø.tsv"]


def test_all_files_are_sent_in_byte_order_under_their_names_as_they_are(unit, serve):
    for name in NAMES:
        unit.write(name, b"x")
    os.makedirs(os.path.join(unit.card, "data", "readings", "b"))
    unit.cost = 1
    server = serve()
    server.answer = lambda method, target, length: reply(404 if method == "GET" else 200)
    session = sync(unit, server)
    assert [request.target.split("/")[-1] for request in session.pushes] == [name + "?offset=0" for name in NAMES]
    assert session.finished and unit.position == ("vadsø.tsv", 1)


def test_rows_go_to_the_last_name_that_begins_and_ends_like_a_file_of_readings(unit):
    unit.write("readings-0002_old.tsv", b"x\n")
    unit.measure(1)
    assert unit.read("readings-0002_old.tsv").count(b"\n") == 49 and unit.read(C) == b"x" * 10
    unit.write("readings-0002_old.tsv", b"x" * 102400)
    unit.measure(1)                                             # it is full, and has no number: the rows are lost
    assert sorted(unit.files()) == [A, B, C, "readings-0002_old.tsv"]


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
    unit.cost = 110
    server = serve()
    sessions = [sync(unit, server) for _ in range(3)]
    assert [pushes(session) for session in sessions] == [WHOLE[:1], WHOLE[1:2], WHOLE[2:3]]
    assert all(session.over_time and session.error is None for session in sessions)


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
        "----- (2019, 9, 12, 0, 0, 0, 3, 255) WARN  Signal quality\n"
        "----- 2019-09-12 00:00:00 EXC   Uncaught exception\nTraceback\n")


def test_sessions_and_failures_are_logged_when_wanted(unit, serve):
    unit.log = True
    server = serve(alive=reply(500))
    sync(unit, server)
    assert unit.read("errors-0000.txt", "errors").decode() == (
        "----- 2019-09-12 00:00:00 INFO  Comm cycle. LTE attached: True. Signal quality {'rssi_raw': 8, 'rssi_dbm': -97, 'ber_raw': 99}\n"
        "----- 2019-09-12 00:00:00 EXC   Error transmitting to %s\nalive: 500\n" % server.url)


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
