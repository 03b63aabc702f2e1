"""The pages as people meet them: in a real terminal (tmux) and in a real browser (headless Chromium).

Where one of the two programs is missing, its tests are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from typing import Callable, Iterator

import pytest

import plot_ascii
from test_plot_ascii import NOW, SCRIPT, Unit, archive, daily, seconds, steady

AT = "--xmax 2019-09-26T12:00"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirty sites; one with wide characters in its name."""
    names = ["東京_ref", "Vadsø"] + ["site_%02d" % n for n in range(28)]
    start = NOW - timedelta(days=3)
    return archive(str(tmp_path_factory.mktemp("many")), [Unit(n, steady(start), daily(start)) for n in range(30)],
                   "\n".join("%d %s 10 deployed 2019-09-01" % pair for pair in enumerate(names)))


# -- a terminal -------------------------------------------------------------------------------------------------------


class Terminal:
    """A tmux session of its own, with a shell in it."""

    def __init__(self, directory: str, cells: int, lines: int, locale: str = "C.UTF-8") -> None:
        self.socket = os.path.join(directory, "tmux")
        shell = "env -i PATH=%s HOME=%s TERM=screen LC_ALL=%s CO2D_CONF=/dev/null PS1='$ ' sh" % (
            shlex.quote(os.environ["PATH"]), directory, locale)
        self.tmux("-f", "/dev/null", "-u", "new-session", "-d", "-x", str(cells), "-y", str(lines), shell)
        self.tmux("set-option", "-g", "status", "off")
        self.tmux("resize-window", "-x", str(cells), "-y", str(lines))

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(["tmux", "-S", self.socket, *arguments], check=True, stdout=subprocess.PIPE, timeout=20)
        return done.stdout.decode()

    def send(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def run(self, arguments: str, behind: str = "; echo status=$?") -> None:
        self.send("clear; %s %s %s%s" % (sys.executable, SCRIPT, arguments, behind), "Enter")

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def until(self, wanted: Callable[[str], object], seconds: float = 15) -> str:
        """The screen, as soon as it is as wanted."""
        end = time.monotonic() + seconds
        while True:
            screen = self.screen()
            if wanted(screen):
                return screen
            assert time.monotonic() < end, screen
            time.sleep(0.05)


@pytest.fixture
def terminal(tmp_path: object) -> Iterator[Callable[..., Terminal]]:
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    opened = []

    def make(cells: int = 80, lines: int = 24, locale: str = "C.UTF-8") -> Terminal:
        directory = "%s/%d" % (tmp_path, len(opened))
        os.mkdir(directory)
        opened.append(Terminal(directory, cells, lines, locale))
        return opened[-1]
    yield make
    for each in opened:
        subprocess.run(["tmux", "-S", each.socket, "kill-server"], stderr=subprocess.DEVNULL)


def ended(screen: str) -> bool:
    return bool(re.search(r"status=\d+", screen))


@pytest.mark.parametrize("cells, lines", [(80, 24), (40, 10), (132, 43)])
def test_a_page_fits_the_terminal(many: str, terminal: Callable[..., Terminal], cells: int, lines: int) -> None:
    screen = terminal(cells, lines)
    screen.run("status --db %s %s" % (many, AT), "; printf status=$?")
    shown = screen.until(ended).split("\n")
    assert shown[0].startswith("fleet" if cells > 40 else "2019-09-26"), "nothing scrolled away"
    assert "more (--all)" in shown[lines - 2] or "none" in " ".join(shown)


def test_the_c_locale_gets_ascii_and_colour_stays(many: str, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(locale="C")
    screen.run("co2 --no-pager --db %s %s" % (many, AT))
    shown = screen.until(ended)
    assert shown.isascii() and "Vadso" in shown and "status=0" in shown
    assert "\x1b[36m" in screen.tmux("capture-pane", "-p", "-e")
    screen.send("export NO_COLOR=1", "Enter")
    screen.run("co2 --no-pager --db %s %s" % (many, AT))
    screen.until(lambda text: ended(text) and "NO_COLOR" not in text)
    assert "\x1b[36m" not in screen.tmux("capture-pane", "-p", "-e")


def test_a_long_page_goes_through_the_pager_and_a_short_one_does_not(many: str, terminal: Callable[..., Terminal]) -> None:
    if not shutil.which("less"):
        pytest.skip("less is not installed")
    screen = terminal()
    screen.run("co2 --db %s %s" % (many, AT))
    screen.until(lambda text: "site_15" in text and not ended(text))
    screen.send("G")
    screen.until(lambda text: "blank = no data" in text and not ended(text))
    screen.send("C-c")
    time.sleep(0.5)
    assert not ended(screen.screen()), "Ctrl-C is meant for the pager"
    screen.send("q")
    assert "status=0" in screen.until(ended)
    screen.run("co2 --site site_0* --db %s %s" % (many, AT))
    assert "status=0" in screen.until(ended)


def test_watch_follows_window_and_data_and_leaves_a_sane_terminal(many: str, terminal: Callable[..., Terminal],
                                                                  tmp_path: object) -> None:
    db = str(tmp_path) + "/db.sqlite3"
    shutil.copy(many, db)
    screen = terminal()
    screen.send("echo before", "Enter")
    screen.run("co2 --watch 0.3 --db %s %s" % (db, AT))
    screen.until(lambda text: text.startswith("30 sites") and "+10 more" in text)
    screen.tmux("resize-window", "-x", "100", "-y", "40")
    screen.until(lambda text: "more" not in text and "site_27" in text)
    screen.tmux("resize-window", "-x", "50", "-y", "12")
    screen.until(lambda text: "+22 more" in text)
    other = archive(str(tmp_path) + "/other", [Unit(1, steady(), daily())], "1 elsewhere 10 deployed 2019-09-01")
    os.replace(other, db)
    screen.until(lambda text: text.startswith("1 site") and "elsewhere" in text)
    os.unlink(db)
    screen.until(lambda text: "no database" in text)
    screen.send("C-c")
    shown = screen.until(ended)
    assert "status=130" in shown and "Traceback" not in shown
    assert screen.tmux("display-message", "-p", "#{cursor_flag} #{alternate_on}").strip() == "1 0"


def test_ctrl_c_leaves_no_traceback(many: str, terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    screen.run("--watch 1000 --db %s %s" % (many, AT))
    screen.until(lambda text: "30 sites" in text)
    screen.send("C-c")
    shown = screen.until(ended)
    assert "status=130" in shown and "Traceback" not in shown


def test_wide_characters_keep_columns_aligned(many: str, terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    screen.run("status --site '*ref,Vads*,site_00' --db %s %s" % (many, AT))
    shown = screen.until(lambda text: ended(text) and "3 units" in text)
    lines = [line for line in shown.split("\n") if re.match(" ok |LATE", line)]
    assert len(lines) == 3 and len({plot_ascii.width(line[:line.index("unit-")]) for line in lines}) == 1


# -- a browser --------------------------------------------------------------------------------------------------------

MEASURE = """<script>
let worst = 0, lines = 0, shown = [...document.querySelectorAll("pre")].filter(pre => pre.offsetParent);
for (const pre of shown) {
  const box = pre.getBoundingClientRect(), probe = document.createElement("span");
  probe.textContent = "0".repeat(100); pre.append(probe);
  const cell = probe.getBoundingClientRect().width / 100; probe.remove();
  const walker = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT); let at = 0, node;
  while (node = walker.nextNode()) {
    for (let i = 0; i < node.length; i++) {
      const char = node.data[i];
      if (char == "\\n") { at = 0; lines++; continue; }
      const range = document.createRange(); range.setStart(node, i); range.setEnd(node, i + 1);
      const left = range.getBoundingClientRect().left - box.left + pre.scrollLeft;
      if (char > " " && char <= "~") worst = Math.max(worst, Math.abs(left - at * cell));
      at += /[\\u1100-\\u115f\\u2e80-\\ua4cf\\uac00-\\ud7a3\\uf900-\\ufaff\\uff00-\\uff60]/.test(char) ? 2 : 1;
    }
  }
}
const over = document.documentElement.scrollWidth - innerWidth, inner = Math.max(...shown.map(pre => pre.scrollWidth - pre.clientWidth));
document.title = `worst=${worst.toFixed(2)} lines=${lines} pres=${shown.length} over=${over} inner=${inner}`;
</script>"""


@pytest.mark.long
@pytest.mark.parametrize("pixels", [400, 1280])
@pytest.mark.parametrize("view", ["alive", "index"])
def test_columns_are_aligned_in_a_browser_and_fit_it(many: str, tmp_path: object, view: str, pixels: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("chromium is not installed")
    markup = plot_ascii.web_page(view, many, {}, True, seconds(NOW))
    with open(str(tmp_path) + "/page.html", "w", encoding="utf-8") as file:
        file.write(markup.replace("</body>", MEASURE + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-background-networking " \
            "--disable-component-update --dump-dom --window-size=%d,900 --user-data-dir=%s/profile" % (pixels, tmp_path)
    done = subprocess.run([browser, *flags.split(), "file://%s/page.html" % tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=120)
    title = r"<title>worst=([\d.]+) lines=(\d+) pres=(\d+) over=(-?\d+) inner=(-?\d+)</title>"
    found = re.search(title, done.stdout.decode())
    assert found, done.stderr.decode()[-2000:]
    worst, lines, pres, over, inner = map(float, found.groups())
    assert worst < 1 and lines > 30 and over <= 0 and inner <= 0, found[0]
    texts = [name for _, name, _ in plot_ascii.sections(view, plot_ascii.Options()) if name not in plot_ascii.PICTURES]
    assert pres == len(texts), "one form of each section is shown"
