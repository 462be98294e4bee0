"""The runner: mmengine on DeepSpeed."""
