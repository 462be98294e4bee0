"""Uses a finished run: loads it, predicts on images, evaluates again."""
