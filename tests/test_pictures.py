"""Pictures: what is drawn, in literal SVG, from columns with known numbers."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pytest

import co2d
import importer
import plot_ascii
from importer import FOREVER, Bucket, Deployment, Gap, Pings, UnitState
from plot_ascii import CO2, TEMP, Axis, Chart, Frame, Panel, PingRow, Quantity, Scale, SiteRow, Strand, Tick, path, signed, stretches
from test_plot_ascii import NOW, Unit, archive, daily, seconds, steady

HOUR = 3600
DAY = 24 * HOUR


# -- what pictures are drawn from -------------------------------------------------------------------------------------


def columns(n: int, size: int) -> Frame:
    """So many columns, from 0."""
    return Frame([size * i for i in range(n + 1)], [Tick(0, "Jan 1970", 0)], [(0, n, "1 Jan 1970")], size * n, plot_ascii.Zone("UTC"))


def hours(n: int) -> Frame:
    return columns(n, HOUR)


def days(n: int) -> Frame:
    return columns(n, DAY)


def values(low: float, mean: float, high: float) -> Bucket:
    """Two readings."""
    return Bucket(2, 0, 1, 2, 2 * mean, low, high, 0, None, None)


def spike(mean: float, peak: float) -> Bucket:
    return values(mean, mean, mean)._replace(suspects=1, suspect_low=peak, suspect_high=peak)


def over(size: int, buckets: Any) -> list[Bucket | None]:
    """Buckets of columns of one size, from 0: each was read from the begin of its column to the end."""
    return [bucket and bucket._replace(first=n * size, last=n * size + size) for n, bucket in enumerate(buckets)]


def chart(quantity: Quantity, low: float, high: float, buckets: Any = ()) -> Chart:
    return Chart(quantity, Axis([], "1 h", [], []), list(buckets), Scale(low, high))


def stay(status: Any = "deployed", since: int = 0, until: int = FOREVER, unit: str = "co2unit-30aea42a50bc") -> Deployment:
    return Deployment(unit, "varanger-03", "vj_re_sn_3" if status else None, 10, status, since, until)


def site(one: Chart, *stays: Deployment) -> SiteRow:
    """One unit with one quantity."""
    own = list(stays) or [stay()]
    strand = Strand(own[0].unit_id, own[0].nickname, own, {one.quantity.name: one.buckets, "co2": one.buckets})
    return SiteRow("vj_re_sn_3", own, plot_ascii.spans_of(own), {one.quantity.name: one}, False, [strand])


# -- times, paths, runs -----------------------------------------------------------------------------------------------


def test_a_path_is_written_in_steps_and_a_point_is_a_dot() -> None:
    assert path([(0, 40), (500, 25), (1000, 25)]) == "M0 40l500-15 500 0"
    assert path([(0, 40), (500, 25)], "z") == "M0 40l500-15z"
    assert path([(7, 9)]) == "M7 9l12 0"
    assert path([(0, 40), (5, 40), (11, 40), (16, 30), (22, 30), (27, 30)]) == "M0 40l11 0 5-10 11 0"


def test_runs_of_true_values_are_found_to_both_ends() -> None:
    assert stretches([1, 1, None, 0, "x", 3]) == [(0, 2), (4, 6)]
    assert stretches([]) == []


def test_a_rectangle_ends_where_the_picture_ends() -> None:
    frame = hours(4)
    assert frame.rect("gap", (HOUR, 9 * HOUR), 0, 87) == '<rect class="gap" x="25.00%" width="75.00%" y="0" height="87"/>'


def test_a_word_is_drawn_only_where_it_has_room() -> None:
    frame = hours(100)
    assert frame.word("word", (0, 5 * HOUR), 30, "lost") == ""
    assert frame.word("word", (0, 7 * HOUR), 30, "lost") == '<text class="word more" x="3.50%" y="30">lost</text>'
    assert frame.word("word", (0, 8 * HOUR), 30, "34 d") == '<text class="word" x="4.00%" y="30">34 d</text>'
    assert frame.word("word", (-9 * HOUR, 30 * HOUR), 30, "lost") == '<text class="word" x="15.00%" y="30">lost</text>'


def test_numbers_have_a_real_minus() -> None:
    assert signed("%.1f…%.1f °C", (-8.04, 0.26)) == "−8.0…0.3 °C"


# -- a quantity -------------------------------------------------------------------------------------------------------


def test_curves_go_through_the_numbers_and_break_at_a_gap() -> None:
    panel = Panel(hours(4), chart(CO2, 400, 500), 10, 50)
    buckets = [values(400, 420, 440), values(420, 440, 450), None, values(440, 460, 480)]
    assert panel.curves(over(HOUR, buckets), "deployed") == (
        '<path class="co2-band band-deployed" d="M250 400l500-50 0 150-500 100zM1750 200l0 200z"/>'
        '<path class="co2 line-deployed" d="M250 500l500-100M1750 300l12 0"/>')


def test_a_unit_beside_the_deployed_one_has_a_line_without_a_band() -> None:
    panel = Panel(hours(2), chart(CO2, 400, 500), 10, 50)
    assert panel.curves(over(HOUR, [values(400, 420, 440)] * 2), "second") == '<path class="co2 line-second" d="M500 500l1000 0"/>'


def test_temperature_is_filled_to_0_above_and_below() -> None:
    panel = Panel(hours(2), chart(TEMP, -10, 10), 0, 20)
    assert panel.curves(over(HOUR, [values(-5, -5, -5), values(5, 5, 5)]), "deployed") == (
        '<path class="above" d="M500 100l1000-50 0 50-1000 0z"/>'
        '<path class="below" d="M500 150l1000-50-1000 0z"/>'
        '<path class="temp line-deployed" d="M500 150l1000-100"/>')


def test_temperature_has_a_band_where_columns_are_days() -> None:
    drawn = Panel(days(2), chart(TEMP, -10, 10), 0, 20).curves(over(DAY, [values(-10, -5, 0)] * 2), "deployed")
    assert '<path class="temp-band band-deployed" d="M500 100l1000 0 0 100-1000 0z"/>' in drawn


def test_values_off_the_scale_lie_on_its_edge() -> None:
    panel = Panel(hours(2), chart(CO2, 400, 500), 10, 50)
    assert panel.ys([100, 400, 450, 500, 9999]) == [600, 600, 350, 101, 101]


def test_labels_stand_on_round_values_with_room_between() -> None:
    panel = Panel(hours(2), chart(CO2, 330, 510), 9, 48)
    assert list(panel.ticks()) == [350, 400, 450, 500]
    cold = Panel(hours(2), chart(TEMP, -11, 2), 0, 26)
    assert cold.labels() == '<text class="temp-label" x="30" y="28">−10°</text><text class="temp-label" x="30" y="8">0°</text>'


def test_spikes_are_marked_above_the_line_and_the_line_stays() -> None:
    buckets = over(HOUR, [values(420, 420, 420), spike(420, 9991), values(420, 420, 420), *[spike(420, 10)] * 4])
    panel = Panel(hours(7), chart(CO2, 400, 500, buckets), 9, 50)
    assert panel.marks() == ('<text class="mark" x="21.43%" y="8">▲</text>'
                             '<text class="mark" x="71.43%" y="8">▼</text>')
    assert "M143 490l1714 0" in panel.curves(buckets, "deployed")


# -- a site -----------------------------------------------------------------------------------------------------------


def test_each_unit_has_a_line_as_its_stay_is() -> None:
    level = over(HOUR, [values(420, 420, 420)] * 4)
    first = stay("en_route", 0, 2 * HOUR)
    then = stay("deployed", 2 * HOUR)
    successor = stay("lab_check", HOUR, 3 * HOUR, "co2unit-next")
    row = site(chart(CO2._replace(tall=50), 400, 500, level), first, then)
    after = Strand("co2unit-next", "varanger-11", [successor], {"co2": level})
    row = row._replace(stays=[first, then, successor], strands=[*row.strands, after])
    drawn = plot_ascii.chart_strip(hours(4), row, "tall").chart
    assert re.findall('class="co2 line-([a-z_]+)" d="([^"]+)"', drawn) == [
        ("en_route", "M250 490l1000 0"), ("deployed", "M1250 490l500 0"), ("second", "M750 490l1000 0")]


def test_a_gap_is_tinted_and_says_what_became_of_it() -> None:
    row = site(chart(CO2._replace(tall=50), 400, 500, over(HOUR, [values(420, 420, 420), None, None, values(420, 420, 420)])))
    unit = row.stays[0].unit_id
    gaps = [Gap(unit, HOUR, 3 * HOUR, 4, "lost", 0, 1800), Gap(unit, HOUR, HOUR + 9, 1, "lost", 0, 1800), Gap("other", 0, None, 1, "lost", 0, 1800)]
    frame = hours(4)._replace(gaps=gaps)
    strip = plot_ascii.chart_strip(frame, row, "tall")
    assert strip.height == 62
    assert strip.chart.startswith('<rect class="gap" x="25.00%" width="50.00%" y="0" height="62"/><svg viewBox="0 0 2000 620" ')
    assert strip.chart.count('class="gap"') == 1
    assert '<text class="word" x="50.00%" y="34">lost</text>' in strip.chart


def test_the_mouse_is_told_the_numbers_of_a_day() -> None:
    row = site(chart(TEMP._replace(tall=50), -10, 10, over(HOUR, [values(-8, -4, 1), None])))
    strip = plot_ascii.chart_strip(hours(2), row, "tall")
    assert "<title>1 Jan 1970: −8.0…1.0, mean −4.0</title>" in strip.chart


def test_a_ribbon_is_thin_where_a_unit_was_deployed_without_readings() -> None:
    row = site(chart(CO2, 400, 500, [values(420, 420, 420), None, None, values(420, 420, 420)]), stay(since=1800))
    assert plot_ascii.stay_bars(hours(4), row.strands[0], 60) == (
        '<rect class="stay" x="12.50%" width="87.50%" y="62" height="1"/>'
        '<rect class="is-deployed" x="12.50%" width="12.50%" y="60" height="5"/>'
        '<rect class="is-deployed" x="75.00%" width="25.00%" y="60" height="5"/>')


def test_beside_a_site_stand_its_last_values_its_range_and_what_is_off_the_scale() -> None:
    one = chart(CO2, 300, 500, over(HOUR, [values(366, 420, 478), spike(420, 9991)]))
    one.above = 2
    one.last = (HOUR, 444.4)
    row = site(one)
    frame = hours(2)._replace(end=10 * HOUR)
    strip = plot_ascii.fleet_strip(frame, row)
    assert strip.left == [("head", "vj_re_sn_3"), ("", "varanger-03")]
    assert strip.right == [("co2", "444 ppm"), ("more", "366…478 ppm"), ("off", "▲ 2"), ("off more", "to 9 991 ppm")]
    one.stale = True
    there = [("more", "366…478 ppm"), ("off", "▲ 2"), ("off more", "to 9 991 ppm")]
    assert plot_ascii.fleet_strip(frame, row._replace(late=True)).right == [*there, ("bad", "no CO₂ for 9 h")]
    gone = row._replace(stays=[stay(until=5 * HOUR)])
    assert plot_ascii.fleet_strip(frame, gone).right == there, "a site that nobody is at is not silent"


# -- pings ------------------------------------------------------------------------------------------------------------

CALLED = Pings(1, 1, 1, -80.0)


def test_days_with_pings_are_bars_of_what_the_unit_was() -> None:
    row = PingRow([stay("en_route", 0, 2 * DAY), stay("deployed", 2 * DAY)], [CALLED, CALLED, CALLED, None])
    assert plot_ascii.lane(days(4), row, 5, 14) == (
        '<rect class="stay" x="0.00%" width="50.00%" y="12" height="1"/>'
        '<rect class="stay" x="50.00%" width="50.00%" y="12" height="1"/>'
        '<rect class="ping-en_route" x="0.00%" width="50.00%" y="5" height="14"/>'
        '<rect class="end" x="0.00%" width="2" y="3" height="18"/>'
        '<rect class="end" x="50.00%" width="2" y="3" height="18"/>'
        '<rect class="ping-deployed" x="50.00%" width="25.00%" y="5" height="14"/>'
        '<rect class="end" x="50.00%" width="2" y="3" height="18"/>')


def test_silence_of_three_days_is_coloured_where_a_unit_is_deployed() -> None:
    row = PingRow([stay()], [CALLED, None, None, CALLED, None, None, None, CALLED])
    drawn = plot_ascii.lane(days(8), row, 5, 14)
    assert drawn.count('class="silence"') == 1
    assert '<rect class="silence" x="50.00%" width="37.50%" y="5" height="14"/>' in drawn
    assert '<text class="silent" x="68.75%" y="16">3 d</text>' in drawn
    away = row._replace(stays=[stay("lab_check")])
    assert "silence" not in plot_ascii.lane(days(8), away, 5, 14)


def test_beside_pings_stand_the_age_of_the_last_one_and_the_share_of_days() -> None:
    state = UnitState("co2unit-30aea42a50bc", "varanger-03", *[None] * 13)._replace(last_ping=7 * DAY, dbm=-81)
    row = PingRow([stay(since=2 * DAY)], [None, None, *[CALLED] * 5, None], None, state)
    strip = plot_ascii.ping_strip(days(8), [row])
    assert strip.right == [("head", "1 d 00 h ago"), ("dbm", "−81 dBm"), ("more", "5/6 = 83 %"), ("more", "30aea42a50bc")]
    assert "<title>1 Jan 1970: 5 days with pings</title>" in strip.chart


# -- in a real browser ------------------------------------------------------------------------------------------------
#
# Pages of known units are opened in headless Chromium, wide and narrow, light and dark; a script that the test puts in
# writes what it measures into the title. Where Chromium is missing, these tests are skipped.

MEASURE = """<script>
const shown = element => element.getClientRects().length > 0 && getComputedStyle(element).display !== "none";
const texts = [...document.querySelectorAll("body *")].filter(element => shown(element) &&
  [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
const words = texts.filter(text => text.tagName !== "title");
const out = words.filter(text => text.getBoundingClientRect().right > innerWidth + 1 || text.getBoundingClientRect().left < -1);
const small = words.filter(text => parseFloat(getComputedStyle(text).fontSize) < 11);
const box = selector => { const found = document.querySelector(".chart " + selector); if (!found) return null;
  const at = found.getBoundingClientRect(), chart = found.closest(".chart").getBoundingClientRect();
  return [(at.left - chart.left) / chart.width, at.width / chart.width, at.top - chart.top, at.height]; };
const ends = selector => { const found = document.querySelector(".chart " + selector); if (!found) return null;
  const chart = found.closest(".chart").getBoundingClientRect(), matrix = found.getScreenCTM();
  return [0, found.getTotalLength()].map(length => found.getPointAtLength(length).matrixTransform(matrix))
    .map(point => [(point.x - chart.left) / chart.width, point.y - chart.top]); };
const colour = selector => { const found = document.querySelector(".chart " + selector); return found && getComputedStyle(found).fill; };
parent.document.title = JSON.stringify({width: innerWidth, over: document.documentElement.scrollWidth - innerWidth, out: out.map(text => text.textContent),
  small: small.map(text => text.textContent), words: words.length, gap: box(".gap"), ribbon: box(".is-deployed"),
  ping: box(".ping-deployed"), silence: box(".silence"), line: ends("path.co2"), paper: getComputedStyle(document.body).backgroundColor,
  dim: colour(".is-deployed"), labels: [...document.querySelectorAll(".axis text")].filter(shown).map(text => text.textContent),
  charts: document.querySelectorAll(".chart").length, scripts: document.scripts.length});
</script>"""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-background-networking "
         "--disable-component-update --dump-dom")
def in_browser(test: Any) -> Any:
    """A test in a real browser, which takes seconds to start."""
    return pytest.mark.long(pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")(test))


LIGHT, DARK = "1", "0"                  # of Blink's setting preferredColorScheme


def measured(page: str, directory: Any, pixels: int, scheme: str = LIGHT) -> dict[str, Any]:
    """What the script saw, in a frame of that width: a window is at least 500 wide."""
    inside = html.escape(page.replace("</body>", MEASURE + "</body>"))
    with open(os.path.join(directory, "page.html"), "w", encoding="utf-8") as file:
        file.write(f'<!DOCTYPE html><meta charset="utf-8"><title></title><body style="margin: 0">'
                   f'<iframe width="{pixels}" height="900" style="border: 0" srcdoc="{inside}"></iframe>')
    command = [BROWSER, *FLAGS.split(), "--window-size=1400,1000", "--hide-scrollbars", f"--user-data-dir={directory}/profile",
               f"--blink-settings=preferredColorScheme={scheme}", f"file://{directory}/page.html"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    title = re.search("<title>(.*?)</title>", done.stdout.decode(), re.S)
    assert title, done.stderr.decode()[-2000:]
    found = dict(json.loads(html.unescape(title[1])))
    assert found["width"] == pixels
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three sites in two weeks: one whose CO2 rises by 10 ppm a day from 430, one with a hole and a spike, one with a long name; one unit without a
    site; and a unit that did not call for a third of the time."""
    whole = steady(ppm=lambda days: 430 + 10 * days, temp=lambda days: 6 * math.sin(2 * math.pi * days))
    holed = [reading for reading in whole if not NOW - timedelta(days=7) <= reading[0] < NOW - timedelta(days=3.5)]
    holed[100] = (holed[100][0], 9991, 5.0)
    silent = [ping for ping in daily() if not NOW - timedelta(days=10) <= ping[0] < NOW - timedelta(days=5)]
    units = [Unit(1, whole, daily()), Unit(2, holed, silent), Unit(3, whole, daily()), Unit(4, whole, daily())]
    table = "1 vj_re_sn_1 12 deployed 2019-09-01\n2 vj_re_sn_2 11 deployed 2019-09-01\n3 Vadsø_backyard_of_the_office_東京 10 deployed 2019-09-01"
    return archive(str(tmp_path_factory.mktemp("fleet")), units, table)


def web_page(db: str, view: str, **query: str) -> str:
    return plot_ascii.web_page(view, db, query, True, seconds(NOW))


@in_browser
@pytest.mark.parametrize("pixels", [400, 1280])
@pytest.mark.parametrize("view, query", [("co2", {}), ("co2", {"site": "vj_re_sn_2"}), ("alive", {}), ("co2", {"unit": "unit-04"}),
                                         ("co2", {"site": "vj_re_sn_1", "recent-days": "2"})])
def test_a_page_fits_its_window_and_is_legible(fleet: str, tmp_path: Any, pixels: int, view: str, query: dict[str, str]) -> None:
    found = measured(web_page(fleet, view, **query), tmp_path, pixels)
    assert found["over"] <= 0
    assert found["out"] == []
    assert found["small"] == []
    assert found["words"] > 20 and found["charts"] > 1
    assert found["scripts"] == 1, "only the one of this test"


@in_browser
@pytest.mark.parametrize("pixels", [400, 1280])
def test_a_line_lies_where_its_numbers_are(fleet: str, tmp_path: Any, pixels: int) -> None:
    page = web_page(fleet, "co2", site="vj_re_sn_1", **{"recent-days": "14"})
    found = measured(page, tmp_path, pixels)
    scale = re.search("CO₂ ppm ([0-9]+)…([0-9]+)", page)
    assert scale
    low, high = map(float, scale.groups())
    (left, first), (right, last) = found["line"]
    assert abs(first - 9 - 200 * (high - 435.9) / (high - low)) < 3
    assert abs(last - 9 - 200 * (high - 575.5) / (high - low)) < 3
    assert left < 0.01 and right > 0.99


@in_browser
@pytest.mark.parametrize("pixels", [400, 1280])
def test_a_gap_and_silence_lie_where_their_times_are(fleet: str, tmp_path: Any, pixels: int) -> None:
    found = measured(web_page(fleet, "co2", site="vj_re_sn_2", **{"recent-days": "14"}), tmp_path, pixels)
    left, width, top, height = found["gap"]
    assert abs(left - 0.5) < 0.01 and abs(width - 0.25) < 0.01
    assert top == 0 and height > 200
    assert abs(found["ribbon"][1] - 0.5) < 0.01
    found = measured(web_page(fleet, "alive", site="vj_re_sn_2", **{"recent-days": "14"}), tmp_path, pixels)
    left, width, _, height = found["silence"]
    assert abs(width - 5 / 14) < 0.01 and height == 14


@in_browser
def test_colours_follow_the_scheme_of_the_reader(fleet: str, tmp_path: Any) -> None:
    page = web_page(fleet, "co2")
    light = measured(page, tmp_path, 1280, LIGHT)
    dark = measured(page, tmp_path, 1280, DARK)
    assert (light["paper"], light["dim"]) == ("rgb(255, 255, 255)", "rgb(92, 101, 110)")
    assert (dark["paper"], dark["dim"]) == ("rgb(20, 23, 26)", "rgb(139, 148, 158)")


@in_browser
def test_a_phone_shows_every_third_date(fleet: str, tmp_path: Any) -> None:
    page = web_page(fleet, "co2")
    wide = measured(page, tmp_path, 1280)["labels"]
    narrow = measured(page, tmp_path, 400)["labels"]
    assert wide[0] == narrow[0]
    assert [label for label in wide if label in narrow] == wide[::3] == narrow


# -- sizes, files, links ----------------------------------------------------------------------------------------------


def test_a_year_of_a_site_and_two_weeks_of_twelve_are_small(tmp_path: Any) -> None:
    year = steady(NOW - timedelta(days=365), ppm=lambda days: 420 + 40 * math.sin(3 * days), temp=lambda days: 9 * math.sin(days))
    fortnight = steady(ppm=lambda days: 420 + 40 * math.sin(3 * days), temp=lambda days: 9 * math.sin(6 * days))
    units = [Unit(0, year, daily()), *[Unit(n, fortnight, daily()) for n in range(1, 12)]]
    table = "\n".join(f"{n} site_{n:02d} 10 deployed 2018-01-01" for n in range(12))
    db = archive(str(tmp_path), units, table)
    assert len(web_page(db, "co2", site="site_00").encode()) < 40_000
    assert len(web_page(db, "co2", **{"recent-days": "14"}).encode()) < 120_000


def test_a_file_has_one_size_and_needs_nothing_from_outside(fleet: str, tmp_path: Any) -> None:
    path = str(tmp_path / "site.svg")
    assert plot_ascii.main(["co2", "--db", fleet, "--site", "vj_re_sn_2", "-o", path], now=seconds(NOW)) == 0
    with open(path, encoding="utf-8") as file:
        text = file.read()
    root = xml.etree.ElementTree.fromstring(text)
    assert root.get("width") == "1160" and root.get("viewBox") == f"0 0 1160 {root.get('height')}"
    assert re.findall("[0-9]%", text) == ["0%", "0%"], "but for the paper behind it"
    assert not re.search("href|var\\(|url\\(|<title|script", text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"CO₂ · vj_re_sn_2", "lost", "CO₂ ppm", "temp °C"} <= set(words)


def test_only_what_has_a_picture_goes_into_a_picture_file(fleet: str, tmp_path: Any, capsys: Any) -> None:
    assert plot_ascii.main(["gaps", "--db", fleet, "-o", str(tmp_path / "gaps.svg")], now=seconds(NOW)) == 2
    assert capsys.readouterr().err == "plot_ascii: there is no picture of this: gaps\n"


def links_of(page: str) -> dict[str, str]:
    line = re.search('<p class="links">(.*?)</p>', page)
    assert line
    return {html.unescape(text): html.unescape(url) for url, text in re.findall('<a href="([^"]*)">(.*?)</a>', line[1])}


def test_a_page_leads_to_other_times_other_sites_and_its_data(fleet: str) -> None:
    assert links_of(web_page(fleet, "co2", site="vj_re_sn_2", **{"recent-days": "7"})) == {
        "14 days": "?site=vj_re_sn_2&recent-days=14",
        "30 days": "?site=vj_re_sn_2&recent-days=30",
        "1 year": "?site=vj_re_sn_2&recent-days=365",
        "all": "?site=vj_re_sn_2&recent-days=0",
        "‹ earlier": "?site=vj_re_sn_2&xmin=2019-09-12T12:00Z&xmax=2019-09-19T12:00Z",
        "‹ vj_re_sn_1": "?site=vj_re_sn_1&recent-days=7",
        "Vadsø_backyard_of_the_office_東京 ›":
            "?site=Vads%C3%B8_backyard_of_the_office_%E6%9D%B1%E4%BA%AC&recent-days=7",
        "text": "?site=vj_re_sn_2&recent-days=7&text=1",
        "CSV": "/data/co2/readings.csv?site=vj_re_sn_2&since=2019-09-19T12:00Z&until=2019-09-26T12:00Z",
        "JSON": "/data/co2/readings.jsonl?site=vj_re_sn_2&since=2019-09-19T12:00Z&until=2019-09-26T12:00Z",
    }


def test_a_page_of_an_earlier_time_leads_to_a_later_one(fleet: str) -> None:
    page = web_page(fleet, "alive", xmin="2019-09-14", xmax="2019-09-18")
    assert links_of(page)["later ›"] == "?xmin=2019-09-18T00:00Z&xmax=2019-09-22T00:00Z"
    assert links_of(page)["CSV"] == "/data/co2/pings.csv?since=2019-09-14T00:00Z&until=2019-09-18T00:00Z"


def test_every_link_of_a_page_is_answered(fleet: str, tmp_path: Any) -> None:
    settings = importer.Settings()._replace(data_dir=str(tmp_path / "data"), var_dir=str(tmp_path), db=fleet, port=0)
    station = co2d.Station(settings, clock=lambda: seconds(NOW))

    def ask(url: str) -> tuple[int, str, str]:
        head = b"GET %s HTTP/1.0\r\nAccept: text/html\r\n\r\n" % url.encode()
        response = co2d.respond(station, co2d.parse_head(head)._replace(peer="127.0.0.1", now=seconds(NOW)))
        body = response.body or (response.file.read() if response.file else b"")
        return response.status, response.content_type.split(";")[0], body.decode()

    here = "/data/co2/summary?site=vj_re_sn_2"
    status, kind, page = ask(here)
    assert (status, kind) == (200, "text/html")
    kinds = {"CSV": "text/csv", "JSON": "application/x-ndjson", "text": "text/plain"}
    for text, url in links_of(page).items():
        status, kind, body = ask(here.split("?")[0] + url if url.startswith("?") else url)
        assert (status, kind) == (200, kinds.get(text, "text/html")), url
        assert len(body.splitlines()) > 20
    assert ask(here + "&text=1")[2] == plot_ascii.web_page("co2", fleet, {"site": "vj_re_sn_2"}, False, seconds(NOW))


def test_a_unit_without_a_site_has_a_name_and_no_link(fleet: str) -> None:
    for view in ("co2", "alive"):
        page = web_page(fleet, view)
        assert set(re.findall("[?]site=([^\"&]*)", page)) == {
            "vj_re_sn_1", "vj_re_sn_2", "Vads%C3%B8_backyard_of_the_office_%E6%9D%B1%E4%BA%AC"}
        assert '<div class="name"><p class="head">unit-04</p>' in page and "<tr><th>unit-04<td>" in page


def test_below_a_picture_stand_its_numbers(fleet: str) -> None:
    page = web_page(fleet, "co2", site="vj_re_sn_1", **{"recent-days": "3"})
    table = re.search("<table>(.*?)</table>", page, re.S)
    assert table
    assert table[1].splitlines()[2].startswith("<tr><th>24 Sep<td>CO₂ ppm 550…561, mean 555; temp °C −6.0…6.0, mean")


def test_every_sign_of_a_picture_is_in_its_legend(fleet: str) -> None:
    signs = '<text class="mark" x="12" y="9">%s</text></svg> suspect or off the scale'
    assert signs % "▲" in web_page(fleet, "co2", site="vj_re_sn_2", **{"recent-days": "14"})
    assert "suspect or off the scale" not in web_page(fleet, "co2", site="vj_re_sn_1", **{"recent-days": "14"})


def test_names_from_outside_are_harmless_in_a_page_and_in_a_file(tmp_path: Any) -> None:
    db = archive(str(tmp_path), [Unit(1, steady(), daily())], "1 <b>&\"'x 10 deployed 2019-09-01")
    for page in (web_page(db, "co2"), web_page(db, "alive"), web_page(db, "co2", site="<b>&\"'x")):
        assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    path = str(tmp_path / "fleet.svg")
    assert plot_ascii.main(["pings", "--db", db, "-o", path], now=seconds(NOW)) == 0
    xml.etree.ElementTree.parse(path)


# -- scales, labels, legends, what is not there -----------------------------------------------------------------------


def test_the_scale_of_a_picture_has_99_of_100_extremes_and_all_means() -> None:
    level = [values(400, 410, 420)] * 398
    extremes = [*level, values(300, 405, 420), values(400, 415, 900)]
    assert plot_ascii.make_scale(extremes, 50, None, fenced=False) == Scale(400, 420)
    assert plot_ascii.make_scale([*extremes, values(400, 450, 900)], 50, None, fenced=False) == Scale(400, 450)
    frost = [values(-9, 0, 9)] * 3
    assert plot_ascii.make_scale(frost, 5, None, fenced=False) == Scale(-10, 10)


def test_in_little_room_stand_0_and_the_farthest_round_value() -> None:
    for low, high, ticks in ((-14, 14, [-10, 0]), (-20, 30, [0, 30]), (-30, 20, [-30, 0]), (8, 17, [8, 16]), (-9.5, -2, [-8, -2])):
        assert list(Panel(days(2), chart(TEMP, low, high), 0, 26).ticks()) == ticks, (low, high)


def test_labels_of_co2_are_at_least_12_pixels_apart() -> None:
    assert list(Panel(days(2), chart(CO2, 300, 500), 0, 48).ticks()) == [300, 400, 500]
    assert list(Panel(days(2), chart(CO2, 330, 500), 0, 48).ticks()) == [350, 400, 450, 500]


def test_a_curve_breaks_at_a_gap_that_no_column_is_wholly_in() -> None:
    gap = Gap("co2unit-30aea42a50bc", HOUR + 1200, 2 * HOUR + 1800, 2, "lost", 0, 1200)
    panel = Panel(hours(4)._replace(gaps=[gap]), chart(CO2, 400, 500), 10, 50)
    first, second, third, fourth = over(HOUR, [values(420, 420, 420)] * 4)
    ends_early = second._replace(last=HOUR + 1200)
    begins_late = third._replace(first=2 * HOUR + 1800)
    drawn = panel.curves([first, ends_early, begins_late, fourth], "deployed")
    assert '<path class="co2 line-deployed" d="M250 500l333 0M1375 500l375 0"/>' in drawn


def test_nothing_is_drawn_of_another_unit_where_it_is_off_the_scale() -> None:
    panel = Panel(hours(2), chart(CO2, 400, 500), 10, 50)
    assert panel.on_scale(values(600, 610, 620)) is None
    assert panel.on_scale(values(400, 410, 620)) == values(400, 410, 620)
    assert panel.on_scale(None) is None


def test_suspect_values_within_the_scale_are_marked_and_told() -> None:
    buckets = over(HOUR, [values(420, 420, 420), spike(420, 480)])
    assert Panel(hours(2), chart(CO2, 400, 500, buckets), 9, 50).marks() == '<text class="mark" x="75.00%" y="8">?</text>'
    assert plot_ascii.spread(CO2, buckets) == {"range": "420…420", "mean": "mean 420", "suspect": "1 suspect"}


def test_a_column_that_only_holds_the_value_before_it_is_not_told() -> None:
    buckets = over(HOUR, [values(420, 420, 420)])
    assert plot_ascii.spread(CO2, [*buckets, buckets[0]._replace(held=True)]) == {"range": "420…420", "mean": "mean 420"}
    assert plot_ascii.spread(CO2, [buckets[0]._replace(held=True), None]) == {}


def test_each_row_may_have_a_scale_of_its_own(fleet: str, tmp_path: Any) -> None:
    def about(page: str) -> str:
        return re.search('<p class="about">(.*?)</p>', page)[1]

    def labels(page: str) -> list[list[str]]:
        return [re.findall('co2-label"[^>]*>([0-9]+)<', strip) for strip in page.split('<div class="strip">')[1:]]
    units = [Unit(1, steady(ppm=lambda days: 400 + days), daily()), Unit(2, steady(ppm=lambda days: 900 + days), daily())]
    db = archive(str(tmp_path), units, "1 near 12 deployed 2019-09-01\n2 far 11 deployed 2019-09-01")
    common = web_page(db, "co2")
    own = web_page(db, "co2", **{"own-scale": "1"})
    assert about(common).endswith("2 sites · mean and range of 3 h · CO₂ ppm 400…950 · temp °C 4.5…5.5")
    assert about(own).endswith("2 sites · mean and range of 3 h")
    assert labels(common) == [["400", "600", "800"]] * 2
    assert labels(own) == [["400", "405", "410", "415"], ["900", "905", "910", "915"]]
    assert links_of(common)["own scales"] == "?own-scale=1" and links_of(own)["one scale"] == "?own-scale="


def test_a_legend_has_each_style_that_is_drawn_and_no_other(fleet: str) -> None:
    page = web_page(fleet, "alive", unit="unit-04")
    keys = re.search('<p class="about">(<span>.*?)</p>', page)[1]
    assert re.findall("</svg> (.*?)</span>", keys) == ["without a site"]
    assert "no data" not in web_page(fleet, "co2", site="vj_re_sn_1").split("<details>")[0]
    assert hours(2).rect("gap", (-9 * HOUR, -HOUR), 0, 50) == "", "a gap before the picture"


def test_a_time_without_readings_says_so_and_leads_elsewhere(fleet: str) -> None:
    page = web_page(fleet, "co2", xmin="2019-01-01", xmax="2019-02-01")
    assert "<p>No readings in this time.</p>" in page and "<svg" not in page
    assert links_of(page)["14 days"] == "?recent-days=14" and "later ›" in links_of(page)
    assert "‹ earlier" not in links_of(page), "there is nothing before the first reading"


def test_late_sites_are_named_above_the_picture(fleet: str, tmp_path: Any) -> None:
    units = [Unit(1, steady(), daily()), Unit(2, steady(end=NOW - timedelta(days=6)), daily(end=NOW - timedelta(days=6)))]
    db = archive(str(tmp_path), units, "1 near 12 deployed 2019-09-01\n2 far<b> 11 deployed 2019-09-01")
    assert '<p class="bad">1 late: far&lt;b&gt;</p>' in web_page(db, "co2")
    assert '<p class="bad">1 late: far&lt;b&gt;</p>' in web_page(db, "alive")
    assert " late: " not in web_page(fleet, "co2", site="vj_re_sn_1")


def test_marks_of_direction_do_not_reach_a_picture(tmp_path: Any) -> None:
    db = archive(str(tmp_path), [Unit(1, steady(), daily())], "1 bi\u202edi 12 deployed 2019-09-01")
    for view in ("co2", "alive"):
        assert "\u202e" not in html.unescape(web_page(db, view))


def test_a_site_with_a_space_is_linked_so_that_it_is_found(tmp_path: Any) -> None:
    db = archive(str(tmp_path), [Unit(1, steady(), daily())], "1 lab+desk 12 deployed 2019-09-01")
    assert '<a href="/data/co2/summary?tz=UTC&amp;site=lab%2Bdesk">' in web_page(db, "co2", tz="UTC", **{"min-tier": "1"})
    assert "%20" in plot_ascii.url("", {"site": "lab desk"})


def test_readings_that_come_a_little_later_each_time_are_one_line() -> None:
    """A rhythm of 30 min and 5 s: in a column of 30 min there is one reading, and no gap."""
    size = HOUR // 2
    buckets = [bucket and bucket._replace(first=n * (size + 5), last=n * (size + 5)) for n, bucket in enumerate([values(420, 420, 420)] * 9)]
    drawn = Panel(columns(9, size), chart(CO2, 400, 500), 10, 50).curves(buckets, "deployed")
    assert drawn.count("M") == 2, "one band, one line"


def test_a_suspect_value_leaves_the_line_whole_and_a_dead_sensor_does_not() -> None:
    level = values(420, 420, 420)
    none = spike(420, 5000)._replace(n=0, low=None, high=None, total=0)
    panel = Panel(hours(7), chart(CO2, 400, 500), 10, 50)
    at_end = [bucket._replace(last=bucket.first + 1800) for bucket in over(HOUR, [level, none, level, level, none, none, level])]
    lines = re.search('line-deployed" d="([^"]*)"', panel.curves(at_end, "deployed"))[1]
    assert lines == "M71 500l858 0M1786 500l12 0"


def test_a_value_just_outside_the_99_of_100_is_no_alarm() -> None:
    level = [values(400, 410, 460)] * 398
    assert plot_ascii.make_scale([*level, values(398, 405, 466)], 50, None, fenced=False) == Scale(395, 470)
    assert plot_ascii.make_scale([*level, values(300, 405, 900)], 50, None, fenced=False) == Scale(400, 460)


def test_pings_in_the_field_are_counted_by_whole_days() -> None:
    def share(*stays: Deployment, called: Any = (CALLED,) * 8) -> str:
        state = UnitState("co2unit-30aea42a50bc", "varanger-03", *[None] * 13)._replace(last_ping=7 * DAY)
        return dict((style, text) for style, text in plot_ascii.ping_strip(days(8), [PingRow(list(stays), called, None, state)]).right if " = " in text)["more"]
    assert share(stay(since=DAY // 4)) == "7/7 = 100 %", "whole days"
    assert share(stay("lab_check", 0, 3 * DAY), stay(since=3 * DAY)) == "5/5 = 100 %"
    assert share(stay(until=4 * DAY + 3600), stay(since=4 * DAY + 7200)) == "7/7 = 100 %"
    assert share(stay(), called=[CALLED, None] * 4) == "4/8 = 50 %"


def test_the_row_of_pings_is_that_of_the_unit_in_the_field() -> None:
    def state(unit: str) -> UnitState:
        return UnitState(unit, unit, *[None] * 13)._replace(last_ping=7 * DAY)
    old = PingRow([stay(until=3 * DAY, unit="co2unit-old")], [CALLED] * 3 + [None] * 5, None, state("co2unit-old"))
    new = PingRow([stay(since=2 * DAY, unit="co2unit-new")], [None] * 2 + [CALLED] * 6, 9 * DAY, state("co2unit-new"))
    strip = plot_ascii.ping_strip(days(8), [old, new])
    assert ("more", "new") in strip.right and strip.right[0][0] == "bad"


def test_part_of_a_stay_may_stand_for_its_site() -> None:
    lab = stay("lab_check", 0, 5 * DAY, "co2unit-lab")
    field = stay(since=2 * DAY, unit="co2unit-field")
    row = SiteRow("vj_re_sn_3", [lab, field], plot_ascii.spans_there([lab, field]), {})
    assert plot_ascii.standing(row, field) == [field]
    assert plot_ascii.standing(row, lab) == [lab._replace(until=2 * DAY)]


def test_what_is_yet_to_come_at_the_end_of_a_page_is_not_on_it(tmp_path: Any) -> None:
    units = [Unit(1, steady(), daily()), Unit(2, steady(), daily())]
    db = archive(str(tmp_path), units, "1 there 12 deployed 2019-09-01 2019-09-25\n2 there 12 deployed 2019-09-25")
    assert "unit-02" in web_page(db, "co2") and "since 25 Sep 2019" in web_page(db, "co2")
    then = web_page(db, "co2", xmax="2019-09-20")
    assert "unit-01" in then and "unit-02" not in then
    then = web_page(db, "alive", xmax="2019-09-20").split("<h2>Units")[0]
    assert "unit-01" in then and "unit-02" not in then


def test_a_site_shows_the_units_of_the_time_not_its_first_three(tmp_path: Any) -> None:
    units = [Unit(n, steady(), daily()) for n in range(1, 6)]
    table = "\n".join(f"{n} many 12 deployed 2019-0{n}-01 2019-0{n}-20" for n in range(1, 5)) + "\n5 many 12 deployed 2019-09-01"
    page = web_page(archive(str(tmp_path), units, table), "co2", site="many", **{"recent-days": "7"})
    assert "unit-05" in page and "unit-01" not in page and 'class="co2 line-deployed"' in page


def test_more_sites_than_a_page_has_are_counted(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plot_ascii.Options, "rows", 2)
    units = [Unit(n, steady(), daily()) for n in range(1, 4)]
    db = archive(str(tmp_path), units, "\n".join(f"{n} site_{n} 12 deployed 2019-09-01" for n in range(1, 4)))
    for view in ("co2", "alive"):
        assert "2 sites, +1 more (all=1, --all) · " in web_page(db, view)
        assert "3 sites · " in web_page(db, view, all="1")


def test_a_sensor_that_died_is_told_but_its_site_is_not_late(tmp_path: Any) -> None:
    broken = [(when, ppm, 85.0 if when > NOW - timedelta(days=4) else temp) for when, ppm, temp in steady()]
    db = archive(str(tmp_path), [Unit(1, broken, daily())], "1 here 12 deployed 2019-09-01")
    page = web_page(db, "co2")
    assert '<p class="warn">no temp for' in page and " late: " not in page


def test_missing_values_are_not_suspect() -> None:
    nothing = Bucket(2, 0, 1, 0, 0, None, None, 0, None, None)
    assert chart(TEMP, -10, 10, [nothing, spike(5, 85)]).marks == ["", "up"]


def test_who_is_on_the_way_stands_for_a_site_before_who_is_in_the_lab() -> None:
    lab, way, field = (stay(status, 0, until, "co2unit-" + status) for status, until in (("lab_check", 9), ("en_route", 6), ("deployed", 3)))
    assert plot_ascii.spans_there([lab, way, field]) == [("co2unit-deployed", 0, 3), ("co2unit-en_route", 3, 6), ("co2unit-lab_check", 6, 9)]


def test_two_units_of_a_site_draw_its_line_once(tmp_path: Any) -> None:
    units = [Unit(1, steady(), daily()), Unit(2, steady(ppm=lambda days: 440), daily())]
    db = archive(str(tmp_path), units, "1 both 12 deployed 2019-09-01\n2 both 12 deployed 2019-09-01")
    assert web_page(db, "co2").count('class="co2 line-deployed" d=') == 1 + 1, "and once in the legend"
    assert web_page(db, "co2", site="both", **{"recent-days": "14"}).count('class="co2 line-deployed" d=') == 2 + 1


def test_names_with_lines_below_are_not_underlined() -> None:
    assert "pre a { text-decoration: none" in plot_ascii.HTML and ".strip a { text-decoration: none" in plot_ascii.HTML
