"""What is drawn has the names of a user's own classes in it, whatever they are."""

from __future__ import annotations

import io

from rmoe.reporting.analysis import LayerLoad
from rmoe.reporting.pictures import _legend, draw_load


def test_class_names_are_no_formulas() -> None:
    names = ["$\\frac$", "a$b", "_hidden"]
    figure = draw_load({"a.mlp": LayerLoad([0.5, 0.5], 1.0, 1.0, {name: [1, 2] for name in names}, 0.0)})
    _legend(figure, [(name, "red") for name in names])
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.legends[0].get_texts()) == 3
