"""What the tests of deployment share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mmengine.logging import MMLogger


@pytest.fixture(autouse=True)
def loggers_of_the_test() -> Iterator[None]:
    """Forgets mmengine's loggers after a test: they would write to the stream that pytest has closed by then."""
    yield
    MMLogger._instance_dict.clear()
