"""Pictures: what is drawn, in literal SVG, from columns with known numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import plot_ascii
from importer import Bucket, Deployment, FOREVER, Pings
from plot_ascii import Frame, Panel, Scale, Strip, crossed, path, signed, stretches

HOUR = 3600
DAY = 24 * HOUR


# -- what pictures are drawn from -------------------------------------------------------------------------------------


class Quantity(NamedTuple):
    name: str
    label: str
    form: str


CO2 = Quantity("co2", "CO₂ ppm", "%.0f")
TEMP = Quantity("temp", "temp °C", "%.1f")


class Chart(NamedTuple):
    quantity: Quantity
    buckets: list[Any]
    scale: Scale
    below: int = 0
    above: int = 0
    last: Any = None

    @property
    def marks(self) -> list[str]:
        return [plot_ascii.mark(bucket, self.scale) for bucket in self.buckets]

    @property
    def ends(self) -> Any:
        return plot_ascii.Chart(plot_ascii.CO2, plot_ascii.Axis([], "", []), self.buckets, self.scale).ends


class Strand(NamedTuple):
    unit_id: str
    nickname: str
    stays: list[Deployment]
    buckets: dict[str, list[Any]]


class SiteRow(NamedTuple):
    name: str
    stays: list[Deployment]
    charts: dict[str, Chart]
    late: bool
    strands: list[Strand]


class PingRow(NamedTuple):
    name: str
    stays: list[Deployment]
    columns: list[Any]
    late: Any = None
    last: Any = None
    dbm: Any = None


class Gap(NamedTuple):
    start: int
    end: Any
    state: str


def hours(n: int) -> Frame:
    """So many columns of an hour, from 0."""
    return Frame([HOUR * i for i in range(n + 1)], [(0, "1 Jan")], [(0, n, "1 Jan 1970")])


def days(n: int) -> Frame:
    return Frame([DAY * i for i in range(n + 1)], [(0, "1 Jan")], [(0, n, "1 Jan 1970")])


def values(low: float, mean: float, high: float) -> Bucket:
    """Two readings."""
    return Bucket(2, 0, 1, 2, 2 * mean, low, high, 0, None, None)


def spike(mean: float, peak: float) -> Bucket:
    return values(mean, mean, mean)._replace(suspects=1, suspect_low=peak, suspect_high=peak)


def stay(status: Any = "deployed", since: int = 0, until: int = FOREVER, unit: str = "co2unit-30aea42a50bc") -> Deployment:
    return Deployment(unit, "varanger-03", "vj_re_sn_3" if status else None, 10, status, since, until)


def site(quantity: Quantity, buckets: list[Any], scale: Scale, *stays: Deployment) -> SiteRow:
    """One unit with one quantity."""
    own = list(stays) or [stay()]
    strand = Strand(own[0].unit_id, own[0].nickname, own, {quantity.name: buckets, "co2": buckets})
    return SiteRow("vj_re_sn_3", own, {quantity.name: Chart(quantity, buckets, scale)}, False, [strand])


# -- times, paths, runs -----------------------------------------------------------------------------------------------


def test_a_path_is_written_in_steps_and_a_point_is_a_dot() -> None:
    assert path([(0, 40), (500, 25), (1000, 25)]) == "M0 40l500-15 500 0"
    assert path([(0, 40), (500, 25)], "z") == "M0 40l500-15z"
    assert path([(7, 9)]) == "M7 9l0 0"


def test_a_line_has_a_point_where_it_crosses_a_level() -> None:
    assert list(crossed([(0, 10), (100, 30), (200, 40), (300, 20)], 25)) == [
        (0, 10), (75, 25), (100, 30), (200, 40), (275, 25), (300, 20)]
    assert list(crossed([(0, 25), (100, 30)], 25)) == [(0, 25), (100, 30)]


def test_runs_of_true_values_are_found_to_both_ends() -> None:
    assert stretches([1, 1, None, 0, "x", 3]) == [(0, 2), (4, 6)]
    assert stretches([]) == []


def test_a_rectangle_ends_where_the_picture_ends() -> None:
    frame = hours(4)
    assert frame.rect("gap", (HOUR, 9 * HOUR), 0, 87) == '<rect class="gap" x="25.00%" width="75.00%" y="0" height="87"/>'
    assert frame.rect("gap", (5 * HOUR, 9 * HOUR), 0, 87) == ""


def test_a_word_is_drawn_only_where_it_has_room() -> None:
    frame = hours(100)
    assert frame.word("word", (0, HOUR), 30, "lost") == ""
    assert frame.word("word", (0, 6 * HOUR), 30, "lost") == '<text class="word more" x="3.00%" y="30">lost</text>'
    assert frame.word("word", (-9 * HOUR, 20 * HOUR), 30, "lost") == '<text class="word" x="10.00%" y="30">lost</text>'


def test_numbers_have_a_real_minus() -> None:
    assert signed("%.1f…%.1f °C", (-8.04, 0.26)) == "−8.0…0.3 °C"


# -- a quantity -------------------------------------------------------------------------------------------------------


def test_curves_go_through_the_numbers_and_break_at_a_gap() -> None:
    panel = Panel(hours(4), Chart(CO2, [], Scale(400, 500)), 10, 50)
    buckets = [values(400, 420, 440), values(420, 440, 450), None, values(440, 460, 480)]
    assert panel.curves(buckets, "deployed") == (
        '<path class="co2-band band-deployed" d="M250 400l500-50 0 150-500 100zM1750 200l0 200z"/>'
        '<path class="co2 line-deployed" d="M250 500l500-100M1750 300l0 0"/>')


def test_a_unit_beside_the_deployed_one_has_a_line_without_a_band() -> None:
    panel = Panel(hours(2), Chart(CO2, [], Scale(400, 500)), 10, 50)
    assert panel.curves([values(400, 420, 440)] * 2, "second") == '<path class="co2 line-second" d="M500 500l1000 0"/>'


def test_temperature_is_filled_to_0_above_and_below_from_where_it_crosses() -> None:
    panel = Panel(hours(2), Chart(TEMP, [], Scale(-10, 10)), 0, 20)
    assert panel.curves([values(-5, -5, -5), values(5, 5, 5)], "deployed") == (
        '<path class="above" d="M500 100l0 0 500 0 500-50 0 50z"/>'
        '<path class="below" d="M500 100l0 50 500-50 500 0 0 0z"/>'
        '<path class="temp line-deployed" d="M500 150l1000-100"/>')


def test_temperature_has_a_band_where_columns_are_days() -> None:
    panel = Panel(days(2), Chart(TEMP, [], Scale(-10, 10)), 0, 20)
    assert 'class="temp-band band-deployed" d="M500 100l1000 0 0 100-1000 0z"' in panel.curves([values(-10, -5, 0)] * 2, "deployed")


def test_values_off_the_scale_lie_on_its_edge() -> None:
    panel = Panel(hours(2), Chart(CO2, [], Scale(400, 500)), 10, 50)
    assert [panel.y(value) for value in (100, 400, 450, 500, 9999)] == [600, 600, 350, 101, 101]


def test_labels_stand_on_round_values_with_room_between() -> None:
    panel = Panel(hours(2), Chart(CO2, [], Scale(330, 500)), 9, 48)
    assert panel.ticks() == [350, 400, 450, 500]
    assert panel._replace(height=200).ticks() == [350, 400, 450, 500]
    cold = Panel(hours(2), Chart(TEMP, [], Scale(-11, 2)), 0, 26)
    assert cold.labels() == '<text class="temp-label" x="30" y="28">−10°</text><text class="temp-label" x="30" y="8">0°</text>'


def test_spikes_are_marked_above_the_line_and_the_line_stays() -> None:
    buckets = [values(420, 420, 420), spike(420, 9991), values(420, 420, 420), *[spike(420, 10)] * 4]
    panel = Panel(hours(7), Chart(CO2, buckets, Scale(400, 500)), 9, 50)
    assert panel.marks() == ('<text class="mark" x="21.43%" y="8">▲</text>'
                             '<text class="mark" x="71.43%" y="8">▼</text>'
                             '<rect class="off" x="42.86%" width="57.14%" y="9" height="1.5"/>')
    assert "M143 490l286 0 285 0 286 0 286 0 285 0 286 0" in panel.curves(buckets, "deployed")


# -- a site -----------------------------------------------------------------------------------------------------------


def test_what_a_unit_is_decides_how_its_columns_are_drawn() -> None:
    stays = [stay("lab_check", 0, 2 * HOUR), stay("deployed", 2 * HOUR), stay("lab_check", 3 * HOUR, 4 * HOUR, "other")]
    frame = hours(4)
    assert plot_ascii.kinds_of(stays[0].unit_id, frame, stays) == ["lab_check", "lab_check", "deployed", "deployed"]
    assert plot_ascii.kinds_of("other", frame, stays) == ["deployed", "deployed", "deployed", "second"]


def test_a_gap_is_tinted_and_says_what_became_of_it() -> None:
    row = site(CO2, [values(420, 420, 420), None, None, values(420, 420, 420)], Scale(400, 500))
    panel = Panel(hours(4), row.charts["co2"], 9, 50)
    height, drawn = plot_ascii.site_chart(row, [panel], [Gap(HOUR, 3 * HOUR, "lost"), Gap(HOUR, HOUR + 9, "lost")])
    assert height == 62
    assert drawn.startswith('<rect class="gap" x="25.00%" width="50.00%" y="0" height="62"/><svg viewBox="0 0 2000 620" ')
    assert drawn.count('class="gap"') == 1
    assert '<text class="word" x="50.00%" y="38">lost</text>' in drawn


def test_the_mouse_is_told_the_numbers_of_a_day() -> None:
    row = site(TEMP, [values(-8, -4, 1), None], Scale(-10, 10))
    panel = Panel(hours(2), row.charts["temp"], 9, 50)
    assert "<title>1 Jan 1970: temp °C −8.0…1.0, mean −4.0</title>" in plot_ascii.site_chart(row, [panel], [])[1]


def test_a_ribbon_is_thin_where_a_unit_was_deployed_without_readings() -> None:
    row = site(CO2, [values(420, 420, 420), None, None, values(420, 420, 420)], Scale(400, 500), stay(since=1800))
    assert plot_ascii.stay_bars(hours(4), row.strands[0], 60) == (
        '<rect class="stay" x="12.50%" width="87.50%" y="62" height="1"/>'
        '<rect class="is-deployed" x="12.50%" width="12.50%" y="60" height="5"/>'
        '<rect class="is-deployed" x="75.00%" width="25.00%" y="60" height="5"/>')


def test_beside_a_site_stand_its_last_values_its_range_and_what_is_off_the_scale() -> None:
    buckets = [values(366, 420, 478), spike(420, 9991)]
    row = site(CO2, buckets, Scale(300, 500))
    chart = row.charts["co2"]._replace(above=2, last=(HOUR, 444.4))
    strip = plot_ascii.fleet_strip(hours(2), row._replace(charts={"co2": chart}, late=True), [], 10 * HOUR)
    assert text_of(strip) == (["vj_re_sn_3", "varanger-03"], ["444 ppm ", "366…478 ppm", "▲ 2 to 9991 ppm", "9 h late"])


def text_of(strip: Strip) -> tuple[list[str], list[str]]:
    left, right = [["".join(span.text for span in line) for line in lines] for lines in (strip.left, strip.right)]
    return left, right


# -- pings ------------------------------------------------------------------------------------------------------------

CALLED = Pings(1, 1, 1, -80.0)


def test_days_with_pings_are_bars_of_what_the_unit_was() -> None:
    row = PingRow("vj_re_sn_3", [stay("en_route", 0, 2 * DAY), stay("deployed", 2 * DAY)], [CALLED, CALLED, CALLED, None])
    assert plot_ascii.lane(days(4), row, 5, 14) == (
        '<rect class="stay" x="0.00%" width="50.00%" y="12" height="1"/>'
        '<rect class="stay" x="50.00%" width="50.00%" y="12" height="1"/>'
        '<rect class="ping-en_route" x="0.00%" width="50.00%" y="5" height="14"/>'
        '<rect class="end" x="50.00%" width="2" y="3" height="18"/>'
        '<rect class="ping-deployed" x="50.00%" width="25.00%" y="5" height="14"/>'
        '<rect class="end" x="50.00%" width="2" y="3" height="18"/>')


def test_silence_of_three_days_is_coloured_where_a_unit_is_deployed() -> None:
    row = PingRow("vj_re_sn_3", [stay()], [CALLED, None, None, CALLED, None, None, None, CALLED])
    drawn = plot_ascii.lane(days(8), row, 5, 14)
    assert drawn.count('class="silence"') == 1
    assert '<rect class="silence" x="50.00%" width="37.50%" y="5" height="14"/>' in drawn
    assert '<text class="silent" x="68.75%" y="16">3 d</text>' in drawn
    away = row._replace(stays=[stay("lab_check")])
    assert "silence" not in plot_ascii.lane(days(8), away, 5, 14)


def test_beside_pings_stand_the_age_of_the_last_one_and_the_share_of_days() -> None:
    row = PingRow("vj_re_sn_3", [stay(since=2 * DAY)], [None, None, *[CALLED] * 5, None], None, 7 * DAY, -81)
    strip = plot_ascii.ping_strip(days(8), [row], 8 * DAY)
    assert text_of(strip) == (["vj_re_sn_3", "varanger-03"], ["1 d 00 h ago −81 dBm", "5/6 = 83 %"])
    assert "<title>1 Jan 1970: 5 days with pings</title>" in strip.chart
