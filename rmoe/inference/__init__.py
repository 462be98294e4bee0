"""Uses a finished run: loads it, predicts on images, evaluates again."""

from rmoe.quick_imports import install

install()
