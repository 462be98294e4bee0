"""Configs and JSONs of the package are found by their names, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from rmoe.engine import command, launch, shipped
from rmoe.errors import UserError


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find_config(Path("demo/core.py")) == ROOT / "rmoe/configs/demo/core.py"
    assert launch.read_config(Path("demo/core.py"), {}).stage == "core"
    Path("demo").mkdir()
    Path("demo/core.py").write_text("stage = 'mine'")
    assert shipped.find_config(Path("demo/core.py")) == Path("demo/core.py")
    assert launch.read_config(Path("demo/core.py"), {}).stage == "mine"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_json_is_in_the_package(path: Path) -> None:
    assert shipped.find_json(Path(path.name)).read_text() == path.read_text()


def test_the_nearest_names_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in ("demo/rezidual.py", "rmoe/configs/demo/residual.py"):
        with pytest.raises(
            UserError, match=f"there is no config {wrong}; did you mean 'demo/residual.py'.*rmoe configs"
        ):
            shipped.find_config(Path(wrong))
    with pytest.raises(UserError, match=r"there is no DeepSpeed JSON zero2.jsn; did you mean 'zero2.json'"):
        shipped.find_json(Path("zero2.jsn"))
    with pytest.raises(UserError, match="there is no config xyzxyz; give the path"):
        shipped.find_config(Path("xyzxyz"))


def test_the_json_that_is_taken_where_none_is_given() -> None:
    given = command.parser().parse_args(["demo/dense.py"]).deepspeed_config
    assert shipped.find_json(given) == shipped.JSONS / "zero2.json"
