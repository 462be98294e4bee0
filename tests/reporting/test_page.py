"""The page's text: everything of the runs is in it, nothing of theirs is markup, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_runs import COST, LAYER, add_analysis, add_predictions, finished_run

from rmoe.cli import main
from rmoe.errors import UserError
from rmoe.inference.runs import Run
from rmoe.reporting import charts
from rmoe.reporting.comparison import compare
from rmoe.reporting.page import embedded, png, render

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


class Page(HTMLParser):
    """Parses a page: its elements with their attributes, the text outside of scripts and style, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self._inside:
            self.text += data

    def charts(self):
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == "charts"]
        return json.loads(text)


@pytest.fixture(autouse=True)
def small_library(request, monkeypatch):
    """plotly.js is 4.8 MB, which only a browser needs to see."""
    import plotly.offline

    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "/* plotly.js */")


def page(*folders: Path) -> Page:
    return Page(render(compare([Run(folder) for folder in folders])))


def two_arms(folder: Path) -> list[Path]:
    classes = {"dense": {"sky": 50.0, "grass": 30.0}, "residual": {"sky": 51.0, "grass": 20.0}}
    made = [
        finished_run(folder / f"{stage}_{seed}", stage, seed, 40.0 + 2 * seed + (stage == "residual"), classes=of_class)
        for stage, of_class in classes.items()
        for seed in (0, 1)
    ]
    for number, one in enumerate(made):
        add_predictions(one, shade=50 * number)
    add_analysis(made[2])
    return made


def test_a_page_has_everything(tmp_path):
    found = page(*two_arms(tmp_path))
    for text in ("dense_1", "residual_0", "segmentation on scenes", "41.00", "+1.00", "300k"):
        assert text in found.text
    assert "deepspeed --num_gpus 2 launch/train.py config.py --work-dir 'x y'" in found.text
    assert "0123abc, with changes that were not committed" in found.text
    assert "90% of the pixels right" in found.text
    assert LAYER in found.text
    assert "work_dir" in found.text
    drawn = found.charts()
    assert list(drawn["curves"])[:3] == ["mIoU", "loss", "lr"]
    assert [len(chart["data"]) for chart in drawn["curves"].values()][:3] == [4, 4, 4]
    assert drawn["curves"]["loss"]["data"][0]["y"] == [3.0, 2.0, 1.0]
    assert drawn["cost-0-0"]["training FLOPs"]["data"][0]["x"] == [21e9, 21e9]
    assert drawn["differences-0"]["data"][0]["x"] == [1.0]
    bars = drawn["classes-0"]["data"][0]
    assert (bars["y"], bars["x"]) == (["grass", "sky"], [-10.0, 1.0])
    assert drawn["experts-0-2-0"]["data"][0]["z"][0][3] == 0.36364  # 4 of 11
    images = [attributes["src"] for tag, attributes in found.elements if tag == "img"]
    # two images, each with truth and the answers of one run of each arm; image and truth are there once
    assert len(images) == 2 * 4
    assert all(src.startswith("data:image/png;base64,") for src in images)
    assert len(set(images)) == 2 + 2 + 4


def test_every_chart_of_the_page_has_data_and_every_link_a_target(tmp_path):
    found = page(*two_arms(tmp_path))
    drawn = found.charts()
    for _, attributes in found.elements:
        if "data-chart" in attributes:
            chart = drawn[attributes["data-chart"]]
            assert (chart[attributes["data-key"]] if "data-key" in attributes else chart)["data"]
    assert {a["data-chart"] for _, a in found.elements if "data-chart" in a} == set(drawn)
    identities = {attributes.get("id") for _, attributes in found.elements}
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert len(links) > 4
    assert all(link[0] == "#" and link[1:] in identities for link in links)


def test_nothing_is_fetched_and_our_scripts_alone_run(tmp_path):
    text = render(compare([Run(folder) for folder in two_arms(tmp_path)]))
    found = Page(text)
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    ours = [script for attributes, script in found.scripts if attributes.get("type") != "application/json"]
    assert allowed == [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in ours]
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", text)
    assert "url(" not in text


def test_names_are_text_wherever_they_stand(tmp_path):
    name = HOSTILE.replace("/", "∕")[:80]
    run = finished_run(
        tmp_path / name,
        HOSTILE,
        data=HOSTILE,
        config={"model.head": HOSTILE},
        classes={HOSTILE: 1.0},
        cost={**COST, "command": ["train.py", HOSTILE], "device": HOSTILE},
    )
    add_predictions(run, [HOSTILE])
    add_analysis(run, [HOSTILE])
    other = finished_run(tmp_path / "plain", "dense", 0, data=HOSTILE, classes={HOSTILE: 2.0})
    found = page(run, other)
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert not any("onerror" in attributes for _, attributes in found.elements)
    assert "alert(1)" in found.text
    assert "{{7*7}}" in found.text
    texts = json.dumps(found.charts())
    assert "<img" not in texts  # plotly.js reads some tags
    assert "&lt;img" in texts


def test_data_cannot_end_their_element():
    text = embedded({"a": "</script><!--&", "b": [math.nan, math.inf, 1.0]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--&", "b": [None, None, 1.0]}


def test_one_run_and_a_run_without_anything(tmp_path):
    alone = page(finished_run(tmp_path / "alone"))
    assert "differences-0" not in alone.charts()
    assert "There is one run." in alone.text
    assert "have kept no predictions" in alone.text
    assert "None of these runs has a mixture" in alone.text
    nothing = page(finished_run(tmp_path / "nothing", value=None, losses=(), cost=None))
    assert "it was not evaluated yet" in nothing.text
    assert "Nothing was logged yet." in nothing.text
    assert nothing.charts() == {"curves": {}}


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path):
    found = page(finished_run(tmp_path / "run", losses=(2.0, math.nan, 1.0), value=math.nan))
    assert found.charts()["curves"]["loss"]["data"][0]["y"] == [2.0, None, 1.0]
    assert "cost-0-0" not in found.charts()


def test_runs_of_two_data_sets_are_told_apart(tmp_path):
    found = page(finished_run(tmp_path / "a"), finished_run(tmp_path / "b", data="elsewhere"))
    assert "not comparable" in found.text
    assert {a["id"] for tag, a in found.elements if tag == "section"} >= {"results-0", "results-1"}


def test_classes_of_one_arm_and_seed_twice_count_once(tmp_path):
    twice = [finished_run(tmp_path / f"{n}", classes={"sky": 40.0 + n, "sea": math.nan}) for n in (0, 2)]
    other = finished_run(tmp_path / "other", "residual", classes={"sky": 44.0})
    (group,) = compare([Run(folder) for folder in (*twice, other)]).groups
    kind, (sky,) = charts.per_class(group)
    assert (kind, sky["name"], sky["largest"]) == ("IoU", "sky", 3.0)
    assert [(arm.seeds, arm.values, arm.difference) for arm in sky["arms"].values()] == [
        ([0], [41.0], None),
        ([0], [44.0], 3.0),
    ]


def test_values_that_differ_in_case_alone_are_told_apart(tmp_path):
    runs = [finished_run(tmp_path / str(n), config={"model.a": value}) for n, value in enumerate(("Adam", "adam"))]
    assert page(*runs).text.partition("model.a")[2].lstrip().startswith("Adam 0adam 1")


def test_fifty_runs_have_a_legend_of_arms(tmp_path):
    runs = [finished_run(tmp_path / f"{stage}_{n}", stage, n) for n in range(25) for stage in ("dense", "residual")]
    found = page(*runs)
    shown = [trace["name"] for trace in found.charts()["curves"]["loss"]["data"] if trace["showlegend"]]
    assert shown == ["dense", "residual"]
    assert found.text.count("launch/train.py config.py") == 50


def test_long_curves_are_thinned():
    points = [(step, float(step)) for step in range(1, 10_001)]
    few = charts.thinned(points)
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert 390 <= len(few) <= 402
    assert charts.thinned(points[:5]) == points[:5]
    assert charts.thinned([]) == []


@pytest.mark.parametrize(
    "wrong",
    [{"steps": "many"}, {"software": [1]}, {"software": {"commit": 5}}, {"devices": 0}, {"flops_per_step": None}],
)
def test_a_cost_that_does_not_fit_is_left_out_and_told(tmp_path, wrong):
    run = finished_run(tmp_path / "run", cost={**COST, **wrong})
    page = render(compare([Run(run)]))
    assert "cost.json is damaged" in page
    assert "it is left out" in page


@pytest.mark.parametrize("wrong", ["information", "load", "by_class"])
def test_an_analysis_that_does_not_fit_is_left_out_and_told(tmp_path, wrong):
    run = finished_run(tmp_path / "run", "residual")
    add_analysis(run)
    path = run / "analysis" / "analysis.json"
    content = json.loads(path.read_text())
    del content["layers"]["layers.2.blocks.1.mlp"]["load"][wrong]
    path.write_text(json.dumps(content))
    assert f"analysis.json is damaged: layers.layers.2.blocks.1.mlp.load.{wrong}" in render(compare([Run(run)]))


def test_damaged_pictures_and_files_are_named(tmp_path):
    run = finished_run(tmp_path / "run")
    add_predictions(run)
    (run / "predictions" / "0_image.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(UserError, match=r"0_image\.png is no PNG"):
        page(run)
    with pytest.raises(UserError, match=r"absent\.png cannot be read"):
        png(tmp_path / "absent.png")
    (run / "predictions" / "index.json").write_text('{"items": [{"name": "x"}]}')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        page(run)
    (run / "predictions" / "index.json").write_text("[")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        page(run)


def test_stored_names_do_not_lead_out_of_the_folder(tmp_path):
    run = finished_run(tmp_path / "run")
    add_predictions(run, ["a"])
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    index = run / "predictions" / "index.json"
    index.write_text(index.read_text().replace("0_truth.png", "../../secret.png"))
    with pytest.raises(UserError, match="cannot be read"):
        page(run)


def test_the_file_is_checked_first_and_overwritten(tmp_path, capsys):
    run = finished_run(tmp_path / "run")
    out = tmp_path / "report.html"
    out.write_text("old")
    assert main(["report", str(run), "--html", str(out), "--json", str(tmp_path / "report.json")]) == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "report.json").read_text())["groups"][0]["runs"][0]["run"] == "run"
    assert f"{out}: written" in capsys.readouterr().out
    for bad in (tmp_path, tmp_path / "absent" / "x.html"):
        with pytest.raises(SystemExit):
            main(["report", str(run), "--html", str(bad)])
        assert "cannot be written" in capsys.readouterr().err
    out.unlink()
    out.symlink_to("/dev/full")
    assert main(["report", str(run), "--html", str(out)]) == 2
    assert "cannot be written" in capsys.readouterr().err
