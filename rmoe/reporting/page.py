"""The page of a report: one HTML file with its charts, pictures and plotly.js inside, which fetches nothing.

Whatever stands in it of a run (names, classes, paths, logs, pictures) may be anybody's: the template escapes all text,
data lie in the page as JSON that cannot end its element, and a content security policy runs our own scripts alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import rmoe
from rmoe.engine.building import user_errors
from rmoe.engine.predictions import FOLDER, INDEX
from rmoe.errors import UserError
from rmoe.inference.runs import ANALYSIS
from rmoe.reporting import charts
from rmoe.reporting.comparison import Comparison, Entry, Group, finite
from rmoe.reporting.reproduce import commands
from rmoe.reporting.terminal import counted, said_interval

_LARGEST = 4 * 2**20  # bytes of a picture
_PNG = b"\x89PNG\r\n\x1a\n"
_TEMPLATES = files("rmoe.reporting") / "templates"


def render(found: Comparison) -> str:
    """Returns the page as text.

    Raises:
        UserError: the stored predictions of a run are damaged.
    """
    from plotly.offline import get_plotlyjs

    colour = charts.colours(found)
    drawn: dict[str, charts.Chart] = {"curves": charts.curves(found)}
    notes = [*found.notes]
    groups = [_group(number, group, colour, drawn, notes) for number, group in enumerate(found.groups)]
    scripts = [get_plotlyjs(), (_TEMPLATES / "report.js").read_text(encoding="utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"counted": counted, "interval": said_interval}
    template = environment.from_string((_TEMPLATES / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=" · ".join(group.title for group in found.groups),
        runs=found.entries,
        notes=notes,
        groups=groups,
        curves=list(drawn["curves"]),
        thinned=max((len(x) for entry in found.entries for x in entry.run.scalars.values()), default=0),
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{one}'" for one in hashes),
        charts=Markup(embedded(drawn)),
        colour=colour,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=rmoe.__version__,
    )


def embedded(data: Any) -> str:
    """Returns data as JSON that is safe inside a script element: no `<`, `>` or `&`, nothing that is not finite."""
    text = json.dumps(finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _group(
    number: int, group: Group, colour: Mapping[str, str], drawn: dict[str, charts.Chart], notes: list[str]
) -> dict[str, Any]:
    """Returns what the template needs of a group; adds its charts to `drawn`, and to `notes` what is left out."""
    costs: list[tuple[str, str, list[str]]] = []
    for metric in group.metrics:
        charted = charts.cost_and_quality(group, metric, colour)
        if any(chart["data"] for chart in charted.values()):
            costs.append((f"cost-{number}-{len(costs)}", metric, list(charted)))
            drawn[costs[-1][0]] = charted
    if chart := charts.differences(group, colour):
        drawn[f"differences-{number}"] = chart
    kind, rows = charts.per_class(group)
    by_class, left_out = charts.classes(group, kind, rows, colour)
    if by_class:
        drawn[f"classes-{number}"] = by_class
    return {
        "number": number,
        "group": group,
        "costs": costs,
        "has_differences": chart is not None,
        "kind": kind,
        "classes": rows,
        "has_classes": by_class is not None,
        "left_out": left_out,
        "arms": group.arm_names(),
        "predictions": list(_predictions(group)),
        "routing": [
            mine for n, entry in enumerate(group.entries) if (mine := _routing(f"{number}-{n}", entry, drawn, notes))
        ],
        "reproduce": [(entry, commands(entry)) for entry in group.entries],
    }


def _predictions(group: Group) -> Iterator[dict[str, Any]]:
    """Yields, for each validation image that some run has kept, it and the answers: of one run of each arm."""
    shown: dict[str, tuple[Entry, dict[str, Any]]] = {}
    for entry in group.entries:
        kept = _stored(entry.run.left(FOLDER) / INDEX)
        if kept is not None and entry.arm not in shown:
            shown[entry.arm] = entry, kept
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for entry, kept in shown.values():
        with user_errors(f"{entry.run.left(FOLDER) / INDEX} is damaged"):
            for one in kept["items"]:
                pictures = {
                    kind: png(entry.run.left(FOLDER) / Path(str(one[kind])).name)
                    for kind in ("image", "truth", "answer")
                    if kind in one
                }
                item = items.setdefault((str(one["name"]), pictures["image"]), {"name": one["name"], "answers": []})
                item |= {key: pictures.get(key) for key in ("image", "truth")} | {"said": one["true_caption"]}
                answer = {"entry": entry, "step": kept["step"], "caption": one["caption"]}
                item["answers"].append(answer | {"picture": pictures.get("answer")})
    yield from items.values()


def _stored(path: Path) -> dict[str, Any] | None:
    """Returns the content of a JSON file that may be absent."""
    if not path.is_file():
        return None
    with user_errors(f"{path} is damaged"):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content


def png(path: Path) -> str:
    """Returns a PNG file as the address of an image.

    Raises:
        UserError: it is absent, no PNG file, or larger than any that rmoe writes.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= _LARGEST else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}; restore the file or remove its folder") from error
    if not content.startswith(_PNG):
        raise UserError(f"{path} is no PNG file of at most {_LARGEST} bytes; remove its folder")
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _routing(name: str, entry: Entry, drawn: dict[str, charts.Chart], notes: list[str]) -> dict[str, Any] | None:
    """Returns what is known of a run's mixtures, None of a dense one; adds to `notes` what cannot be shown."""
    gates, folder = charts.gates(entry), entry.run.left(ANALYSIS)
    try:
        analysis = entry.run.analysis()
    except UserError as error:
        analysis = None
        notes.append(f"{error}; it is left out")
    if not gates and analysis is None:
        return None
    layers = []
    if analysis is not None:
        for number, (layer, inside) in enumerate(analysis["layers"].items()):
            drawn[f"experts-{name}-{number}"] = charts.classes_by_expert(inside["load"])
            layers.append((f"experts-{name}-{number}", layer, inside["load"]))
    pictures = [path for path in (folder / "experts.png", folder / "norms.png") if path.is_file()]
    return {
        "entry": entry,
        "gates": gates,
        "analysed": analysis is not None,
        "layers": layers,
        "pictures": [(path.stem, png(path)) for path in pictures],
    }
