"""The runner: mmengine on DeepSpeed."""

from rmoe.quick_imports import install

install()
