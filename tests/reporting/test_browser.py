"""The page in a real browser, Debian's Chromium without a screen: it renders, and its links and controls work.

A probe script, let in by its hash as the page's own are, does what a reader would and tells what it saw; the page is in
a frame, whose width may be a phone's. `RMOE_SCREENSHOTS=DIR` keeps pictures of what was seen.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster.packages import missing
from finished_runs import add_analysis, add_predictions, finished_run

from rmoe.inference.runs import Run
from rmoe.reporting.comparison import compare
from rmoe.reporting.page import render

pytestmark = [pytest.mark.browser, pytest.mark.slow]
HOSTILE = "<script>alert(1)</script><b onclick=alert(2)>{{7*7}}" + "very-long-" * 20 + "名前"
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
OPTIONS += [
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--allow-file-access-from-files",
]
FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>
<pre id="seen" hidden></pre>
<script>addEventListener("message", (event) => (document.getElementById("seen").textContent = event.data));</script>
<iframe src="page.html" width="{width}" height="{height}"></iframe>"""
PROBE = """
(async () => {
  const wait = () => new Promise((resolve) => setTimeout(resolve, 400));
  const choose = async (id, value) => {
    const one = document.querySelector(id);
    one.value = value;
    one.dispatchEvent(new Event("change"));
    await wait();
  };
  const colour = () => getComputedStyle(document.body).backgroundColor;
  const ink = () => getComputedStyle(document.querySelector("#curves .js-plotly-plot text")).fill;
  const title = (within) => document.querySelector(`${within} .ytitle`)?.textContent;
  const seen = { errors: [], ready: document.documentElement.dataset.ready };
  addEventListener("error", (event) => seen.errors.push(event.message));
  await wait();
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  seen.width = innerWidth;
  seen.charts = [...document.querySelectorAll("[data-chart]")].filter((box) => box.clientWidth).map((box) => ({
    name: box.dataset.chart,
    drawn: box.querySelectorAll(".main-svg").length > 0,
    inside: box.scrollWidth <= box.clientWidth + 1,
    marks: box.querySelectorAll(".scatterlayer path, .barlayer path, .hm image, .heatmaplayer image").length }));
  seen.images = [...document.images].map((one) => one.loading = "eager") && [];
  await wait();
  seen.images = [...document.images].filter((one) => one.offsetParent).map((one) => one.naturalWidth);
  seen.links = [...document.querySelectorAll("nav a")].map((one) => {
    one.click();
    return location.hash === one.getAttribute("href") && !!document.querySelector(one.getAttribute("href"));
  });
  seen.first = { system: colour(), title: title("#curves") };
  await choose("#theme", "dark");
  seen.chosen = { dark: colour(), ink_dark: ink() };
  await choose("#theme", "light");
  seen.chosen = { ...seen.chosen, light: colour(), ink_light: ink() };
  await choose("#theme", "auto");
  await choose('[data-choose="curves"]', "lr");
  seen.curve = title("#curves");
  document.getElementById("logarithmic").click();
  await wait();
  seen.logarithmic = document.querySelector("#curves [data-chart]").layout?.yaxis.type;
  document.getElementById("logarithmic").click();
  await choose('[data-choose="curves"]', document.querySelector('[data-choose="curves"]').options[0].value);
  const cost = document.querySelector('[data-choose^="cost"]');
  if (cost) {
    await choose('[data-choose^="cost"]', "parameters trained");
    seen.cost = document.querySelector('[data-chart^="cost"] .xtitle').textContent;
  }
  document.querySelectorAll("details").forEach((one) => (one.open = true));
  await wait();
  seen.opened = [...document.querySelectorAll("[data-chart]")].every((box) => box.querySelector(".main-svg"));
  seen.wide_opened = document.documentElement.scrollWidth - innerWidth;
  document.querySelectorAll("details").forEach((one, n) => (one.open = false));
  scrollTo(0, 0);
  await wait();
  parent.postMessage(JSON.stringify(seen), "*");
})();
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    if not shutil.which("chromium") and (why := missing(["chromium"], "chromium")):
        pytest.skip(f"no browser to open the page in: {why}")
    return "chromium"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """A page of two arms over two seeds, one of them with a name that is an attack."""
    folder = tmp_path_factory.mktemp("runs")
    classes = {f"class {n}": 10.0 + n for n in range(40)} | {HOSTILE: 5.0}
    runs = []
    for stage in ("dense", "residual"):
        for seed in (0, 1):
            name = f"{stage}_{seed}" if (stage, seed) != ("residual", 1) else HOSTILE.replace("/", "∕")[:90]
            value = 40.0 + seed + 2 * (stage == "residual")
            losses = [3.0 / step + 0.1 * seed for step in range(1, 30)]
            of_class = {one: number + seed + (stage == "residual") * len(one) / 3 for one, number in classes.items()}
            runs.append(finished_run(folder / name, stage, seed, value, losses=losses, classes=of_class))
            add_predictions(runs[-1], ["a.jpg", HOSTILE], shade=60 * seed)
    add_analysis(runs[2], [*classes])
    return render(compare([Run(one) for one in runs]))


def browse(chromium: str, folder: Path, text: str, *, width: int = 1200, dark: bool = False) -> tuple[Any, list[str]]:
    """Opens a page in a frame; returns what the probe saw, and what the console said."""
    hashed = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    probed = text.replace("script-src ", f"script-src 'sha256-{hashed}' ", 1)
    (folder / "page.html").write_text(probed.replace("</body>", f"<script>{PROBE}</script></body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width, height=1600))
    words = [
        chromium,
        *OPTIONS,
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        "--window-size=1300,1700",
    ]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=60000"]
    address = (folder / "frame.html").as_uri()
    done = subprocess.run([*words, "--dump-dom", address], capture_output=True, text=True, timeout=240)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="seen"[^>]*>(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    assert found[1], "\n".join(console) or done.stderr[-2000:]
    if keep := os.environ.get("RMOE_SCREENSHOTS"):
        (folder / "page.html").write_text(text)
        name = f"{width}_{'dark' if dark else 'light'}.png"
        subprocess.run([*words, f"--screenshot={Path(keep) / name}", address], capture_output=True, timeout=240)
    return json.loads(html.unescape(found[1])), console


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (360, False)])
def test_the_page_works(chromium, page, tmp_path, width, dark):
    seen, console = browse(chromium, tmp_path, page, width=width, dark=dark)
    assert console == []
    assert seen["errors"] == []
    assert seen["ready"] == "yes"
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert seen["wide"] <= 0
    assert seen["wide_opened"] <= 0
    names = {chart["name"] for chart in seen["charts"]}
    assert names >= {"differences-0", "cost-0-0", "classes-0", "curves"}
    assert all(chart["drawn"] and chart["inside"] and chart["marks"] for chart in seen["charts"])
    assert len(seen["images"]) == 8
    assert all(seen["images"])
    assert seen["opened"]
    assert len(seen["links"]) == 6
    assert all(seen["links"])
    black, white = "rgb(20, 23, 27)", "rgb(255, 255, 255)"
    assert seen["first"]["system"] == (black if dark else white)
    assert (seen["chosen"]["dark"], seen["chosen"]["light"]) == (black, white)
    assert (seen["chosen"]["ink_dark"], seen["chosen"]["ink_light"]) == ("rgb(230, 233, 237)", "rgb(27, 31, 36)")
    assert (seen["first"]["title"], seen["curve"], seen["logarithmic"]) == ("mIoU", "lr", "log")
    assert seen["cost"] == "parameters trained"


def test_the_policy_stops_scripts_of_others(chromium, page, tmp_path):
    attacked = page.replace(
        "<main>", "<main><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"
    )
    _, console = browse(chromium, tmp_path, attacked)
    assert len([line for line in console if "Content Security Policy" in line]) >= 2


def test_it_prints(chromium, page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    out = Path(os.environ.get("RMOE_SCREENSHOTS") or tmp_path) / "page.pdf"
    words = [chromium, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    address = (tmp_path / "page.html").as_uri()
    subprocess.run([*words, f"--print-to-pdf={out}", address], capture_output=True, timeout=240, check=True)
    content = out.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") + content.count(b"/Type /Page/") >= 2
