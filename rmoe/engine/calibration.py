"""`calibrate = dict(…)` of a config: gates from clusters, before the first step; see `rmoe.moe.calibrate`."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils.data import DataLoader

from rmoe.config import Calibration, ResidualMoEConfig
from rmoe.engine.randomness import derived_seed, seeded
from rmoe.errors import UserError
from rmoe.moe.calibrate import calibrate


def check_calibration(section: Any, moe: Iterable[ResidualMoEConfig]) -> None:
    """Checks the section `calibrate` of a config, if there is one, against the mixtures of its model.

    Raises:
        UserError: a key or value that `Calibration` does not take, or gates that cannot be calibrated.
    """
    if section is None:
        return
    try:
        calibration, moe = Calibration.from_dict(section), list(moe)
    except UserError as error:
        raise UserError(str(error).replace("Calibration", "calibrate", 1)) from error
    if not moe:
        raise UserError("calibrate sets the gates of a mixture, and the model has none: set calibrate to None")
    for one in moe:
        calibration.check(one)


def calibrate_gates(runner: Any, model: Any) -> None:
    """Calibrates the gates of a run's model on the batches of its first steps; collective.

    It is called before the optimizer is built, which may keep copies of the weights. The order of the data and all
    random states afterwards are those of a run without it.
    """
    calibration, seed = Calibration.from_dict(runner.cfg.calibrate), runner.cfg.randomness.seed
    model.to(get_accelerator().current_device_name())
    start = time.perf_counter()
    with seeded(derived_seed(seed, "calibrate")):
        batches = first_batches(runner.train_loop.dataloader)
        found = calibrate(model, batches, calibration, run=lambda data: _run(model, data), seed=seed)
    runner.logger.info(
        f"gates set from clusters in {time.perf_counter() - start:.1f} s; inputs, largest share / entropy of the load "
        f"/ confidence: {', '.join(f'{name} {one}' for name, one in found.items())}"
    )


def first_batches(loader: DataLoader) -> Iterator[Any]:
    """Yields the batches that `loader` is about to yield; its own samplers do not move."""
    # The data set is shared, and what batch samplers keep is copied.
    sampler = copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})
    yield from DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _run(model: nn.Module, data: Any) -> None:
    """Runs a model of mmengine's protocol on a batch as far as its features, where it says how, and else all of it."""
    data = model.data_preprocessor(data, True)  # type: ignore[operator]
    if hasattr(model, "extract_feat"):
        model.extract_feat(data["inputs"])  # type: ignore[operator]
    else:
        model(**data, mode="tensor")
