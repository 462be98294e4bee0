"""Runs several command lines of launch/train.py one after the other in one process group: only the first start is slow.

Usage: several_runs.py FILE, a JSON list of lists of words; how each ended is written to FILE.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rmoe.engine import launch
from rmoe.errors import UserError


def main(path: str) -> None:
    outcomes = []
    for words in json.loads(Path(path).read_text()):
        try:
            launch.train(launch.parser().parse_args(words))
            outcomes.append("done")
        except (UserError, launch.Diverged) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
