"""mmengine's runner on its DeepSpeed strategy, with what a residual mixture of experts needs besides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from mmengine._strategy import BaseStrategy
from mmengine._strategy.deepspeed import DeepSpeedStrategy, MMDeepSpeedEngineWrapper
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.model import BaseDataPreprocessor, revert_sync_batchnorm
from mmengine.optim import BaseOptimWrapper
from mmengine.runner import EpochBasedTrainLoop, FlexibleRunner
from torch import Tensor, nn

from rmoe.engine.building import user_errors
from rmoe.engine.calibration import calibrate_gates
from rmoe.engine.checkpoint import files, resharding, run_state
from rmoe.engine.checkpoint.files import Layout
from rmoe.engine.checkpoint.weights import load_weights
from rmoe.engine.clipping import check_precision, loss_scaler, mend_clipping
from rmoe.engine.cost import Parameters, count_parameters
from rmoe.engine.leaves import mend_leaves
from rmoe.engine.model_config import check_maps
from rmoe.engine.precision import set_float32_products
from rmoe.engine.terminal import keep_short
from rmoe.engine.trained import Count, count_parts, table
from rmoe.errors import UserError
from rmoe.moe.records import Records, collect
from rmoe.moe.state import global_state_dict


class Diverged(RuntimeError):
    """The loss, its gradient or the weights are not finite; the message names the step and the last good checkpoint."""


class Engine(MMDeepSpeedEngineWrapper):
    """DeepSpeed's engine as mmengine's loops call it.

    Attributes:
        averaged: a copy of the model with an average of its weights, if a hook keeps one.
        records: what the gates decided in the last training step.
    """

    averaged: nn.Module | None = None
    records: Records | None = None

    @property
    def evaluated(self) -> nn.Module:
        """Returns the model to evaluate and to export."""
        return self.model.module if self.averaged is None else self.averaged

    def train_step(self, data: Any, optim_wrapper: BaseOptimWrapper) -> dict[str, Tensor]:
        """Runs one iteration; the gates' losses join the model's as `loss_moe_aux`.

        Returns:
            What the model reports, averaged over all processes, and `grad_norm`, before clipping; on the CPU.

        Raises:
            Diverged: the loss of some process is not finite. Nothing has been updated then. Or the gradient is not,
                which under float16 is no fault before the scale of the loss is below 1.
        """
        module = self.model.module
        data = module.data_preprocessor(data, training=True)
        with collect() as records:
            losses = self._run_forward(data, mode="loss")
        self.records = records
        loss, own = module.parse_losses(losses)
        # If one of the processes has a value that is not finite, all get one, and stop together.
        averages = records.average(torch.stack([torch.as_tensor(value).float() for value in own.values()]))
        if records.sums:
            gates = records.loss()
            loss = loss + gates
            averages = torch.cat([averages[:1] + gates.detach(), averages[1:], gates.detach()[None]])
            own["loss_moe_aux"] = gates
        told = _told(averages)
        optim_wrapper.backward(loss)
        log_vars = dict(zip(own, told(), strict=True))
        if not log_vars["loss"].isfinite():
            raise Diverged("the loss is not finite")
        whole = self.model.is_gradient_accumulation_boundary()
        optim_wrapper.step()
        records.balance_experts(step=whole)
        if (norm := self.model.get_global_grad_norm()) is not None:
            log_vars["grad_norm"] = torch.as_tensor(float(norm))
            scaler = loss_scaler(self.model)
            if not log_vars["grad_norm"].isfinite() and (scaler is None or scaler.cur_scale < 1):
                raise Diverged("the gradient is not finite")
        return log_vars

    def val_step(self, data: Any) -> list[Any]:
        """Returns predictions, in float32 whatever training is computed in: metrics and box operations need it."""
        return self.evaluated(**self.model.module.data_preprocessor(data, False), mode="predict")

    test_step = val_step


def _told(values_N: Tensor) -> Callable[[], Tensor]:
    """Begins to bring values to the CPU; returns a function that waits for them, but not for what the device is asked
    to do meanwhile.
    """
    if not values_N.is_cuda:
        return lambda: values_N
    copy, arrived = values_N.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait


class Strategy(DeepSpeedStrategy):
    """mmengine's DeepSpeed strategy, mended for mixtures of experts.

    Args:
        config: what `rmoe.engine.ds_json.resolve` returned.
        layout: of this run.
        load_from: whole weights to start from, see `rmoe.engine.checkpoint.weights.load_weights`.
        **kwargs: of mmengine's `BaseStrategy`.
    """

    parameters: Parameters
    parts: dict[str, Count]
    calibrate: Callable[[nn.Module], None] | None = None  # called with the model once it has its weights

    def __init__(
        self, *, config: dict[str, Any], layout: dict[str, int], load_from: str | None = None, **kwargs: Any
    ) -> None:
        # Not DeepSpeedStrategy's constructor: it imports optimizers that DeepSpeed no longer has.
        BaseStrategy.__init__(self, **kwargs)
        # Plain data: DeepSpeed writes it into checkpoints, which are read with weights_only=True.
        self.config = json.loads(json.dumps(dict(config, steps_per_print=10**15)))
        check_precision(self.config)
        set_float32_products(self.config)
        self.layout, self._load_from = Layout(**layout), load_from

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """See `BaseStrategy`; until training starts, the terminal gets short lines only."""
        logger = super().build_logger(*args, **kwargs)
        keep_short(logger)
        return logger

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        """See `BaseStrategy`; without a GPU, synchronised batch norm becomes batch norm of each process."""
        with user_errors("model"):
            built = super().build_model(model)
        check_maps(model, built)
        if not torch.cuda.is_available():
            return revert_sync_batchnorm(built)
        # Images travel as bytes from pinned memory and become floats on the device.
        for module in built.modules():
            if isinstance(module, BaseDataPreprocessor):
                module._non_blocking = True
        return built

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        """Initialises or loads the weights; mmengine's would then give every process the experts of the first one."""
        if hasattr(model, "init_weights"):
            with user_errors("model, its init_cfg and its core"):
                model.init_weights()  # type: ignore[operator]
        if self._load_from is not None:
            load_weights(model, Path(str(self._load_from)))
        if self.calibrate is not None:
            self.calibrate(model)
        return model

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> BaseOptimWrapper:
        """See `BaseStrategy`; counts the parameters, of which the groups may have frozen some, and logs what trains."""
        with user_errors("optim_wrapper"):
            built = super().build_optim_wrapper(optim_wrapper, model)
        if model is not None:
            self.parameters, self.parts = count_parameters(model), count_parts(model)
            self.logger.info(table(self.parts))
        return built

    def build_param_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """See `BaseStrategy`."""
        with user_errors("param_scheduler"):
            return super().build_param_scheduler(*args, **kwargs)

    def _wrap_model(self, model: nn.Module) -> Engine:
        self._scale_lr()
        with user_errors("the DeepSpeed JSON"), _scalars_sent():
            engine, self.optim_wrapper.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=self.optim_wrapper.optimizer, config=self.config
            )
        mend_clipping(engine)
        mend_leaves(engine)
        return Engine(model=engine)

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Any = None,
    ) -> None:
        """Writes aside, then renames: what bears the name `filename` is complete.

        With `save_optimizer` it is a folder to resume from, without it a file of the whole model's weights.

        Raises:
            Diverged: a weight is not finite; nothing is written.
            UserError: it cannot be written, or would have a part of an accumulated step and not the rest.
        """
        path, done = Path(filename), self.model.micro_steps % self.layout.accumulation
        if save_optimizer and done:
            raise UserError(
                f"{path.name} would be saved after {done} of the {self.layout.accumulation} iterations of a step "
                "(gradient_accumulation_steps): save at a multiple of them"
            )
        self._require_finite_weights()
        if not save_optimizer:
            files.write_weights(path, self.whole_state_dict())
            return
        tensors, engine = resharding.gather_tensors(self.model.model)
        if self.model.averaged is not None:
            tensors |= resharding.gather_weights(self.model.averaged, resharding.AVERAGE)
        about, history = run_state.gather_state(extra_ckpt or {}, self.optim_wrapper, self._schedulers())
        about["engine"] = engine
        files.write_checkpoint(path, tensors, about, history, about["meta"]["iter"], self.layout)

    def resume(self, filename: str, **kwargs: Any) -> dict[str, Any]:
        """Loads weights, optimizer and schedulers, at whatever layout they were saved; returns the runner's state.

        Raises:
            UserError: the checkpoint is another model's or optimizer's, or has an average and the run keeps none, or
                the other way round.
        """
        path = Path(filename)
        files.check_layout(path, self.layout)
        about, history = files.read_run(path)
        run_state.check(about, path)
        tensors, averaged = files.Tensors(path), self.model.averaged
        if any(key.startswith(resharding.AVERAGE) for key in tensors) != (averaged is not None):
            which, todo = ("no", "remove") if averaged is not None else ("an", "keep")
            raise UserError(
                f"{path} has {which} average of the weights: {todo} rmoe.EMAHook in custom_hooks to go on from it, or "
                f"start a new run: another --work-dir and --cfg-options load_from={path}"
            )
        resharding.restore_tensors(self.model.model, tensors, about["engine"])
        if averaged is not None:
            resharding.restore_weights(averaged, tensors, resharding.AVERAGE)
        return run_state.restore_state(about, history, self.optim_wrapper, self._schedulers())

    def _schedulers(self) -> list[Any]:
        return getattr(self, "param_schedulers", None) or []

    def whole_state_dict(self) -> dict[str, Tensor]:
        """Returns all weights of what is evaluated, on the CPU, experts under global ids: the same on every process.
        Collective.
        """
        module, sharded = self.model.evaluated, self.model.zero_optimization_partition_weights()
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
            return {key: x.clone() for key, x in global_state_dict(module).items()}

    def _require_finite_weights(self) -> None:
        shards = [getattr(p, "ds_tensor", p).detach() for p in self.model.module.parameters()]
        finite = torch.stack([x.isfinite().all() for x in shards]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            raise Diverged("a weight is not finite; it was not saved")


@contextmanager
def _scalars_sent() -> Iterator[None]:
    """Lends a dimension to parameters without any, such as ATSS's scales in mmdet: DeepSpeed cannot send them."""
    send = deepspeed.DeepSpeedEngine._broadcast_model

    def _broadcast_model(engine: deepspeed.DeepSpeedEngine) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if not parameter.dim()]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        send(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    deepspeed.DeepSpeedEngine._broadcast_model = _broadcast_model
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._broadcast_model = send


class Runner(FlexibleRunner):
    """mmengine's `FlexibleRunner`, whose checkpoints say how far they are, and which `train`s from `resume` on."""

    strategy: Strategy

    def build_train_loop(self, loop: Any) -> Any:
        """See `FlexibleRunner`; refuses checkpoints that could not be written, found or resumed."""
        with user_errors("train_cfg and train_dataloader"):
            built = super().build_train_loop(loop)
        self._check_accumulation(built)
        self._check_savers()
        if self.cfg.get("calibrate") is not None and not self._resume:
            self.strategy.calibrate = partial(calibrate_gates, self)
        return built

    def build_val_loop(self, loop: Any) -> Any:
        """See `FlexibleRunner`."""
        with user_errors("val_cfg, val_dataloader and val_evaluator"):
            return super().build_val_loop(loop)

    def load_or_resume(self) -> None:
        """Resumes from the newest checkpoint that is intact, if `rmoe.engine.launch` found any; weights alone were
        loaded with the model.
        """
        self.call_hook("before_resume")
        if self._resume:
            self.resume(str(files.newest_intact(Path(self.work_dir), self.logger.warning)))

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Goes on from the checkpoint folder `filename`."""
        state = self.strategy.resume(filename)
        self.train_loop._epoch, self.train_loop._iter = state["meta"]["epoch"], state["meta"]["iter"]
        run_state.relocate(state["message_hub"]["runtime_info"], Path(self.work_dir))
        self.message_hub.load_state_dict(state["message_hub"])
        self.logger.info(f"resumed {filename}, epoch {self.epoch}, iteration {self.iter}")

    def train(self) -> nn.Module:
        """See `FlexibleRunner`.

        Raises:
            Diverged: the loss or a weight is no longer finite.
        """
        try:
            return super().train()
        except Diverged as error:
            found, _ = files.complete_checkpoints(Path(self.work_dir))
            good = f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"
            raise Diverged(
                f"{error} at step {self.iter + 1}; {good}; lower the learning rate or clip gradients"
            ) from error
        finally:
            self.call_hook("at_end")

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict[str, Any] | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict[str, Any] | None = None,
        by_epoch: bool = True,
        backend_args: dict[str, Any] | None = None,
    ) -> None:
        """See `FlexibleRunner`, which adds one to the epoch or iteration of `meta` even after a validation, where
        they have been counted already: a run resumed from there would leave one out.
        """
        meta = dict(meta or {}, experiment_name=self.experiment_name, cfg=self.cfg.pretty_text)
        self.strategy.save_checkpoint(
            str(Path(out_dir) / filename),
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            extra_ckpt={"meta": meta, "message_hub": self.message_hub.state_dict()},
        )

    def _check_accumulation(self, loop: Any) -> None:
        steps = self.strategy.layout.accumulation
        epoch = len(loop.dataloader) if isinstance(loop, EpochBasedTrainLoop) else 1
        for hook in self.hooks:
            if isinstance(hook, CheckpointHook):
                unit = epoch if hook.by_epoch else 1
                saved_at = [("the last iteration", loop.max_iters), ("save_begin", hook.save_begin * unit)]
                if hook.interval > 0:
                    saved_at.append(("the checkpoint interval", hook.interval * unit))
                if hook.save_best:
                    saved_at += [("the validation interval", one * epoch) for one in loop.dynamic_intervals]
                for name, iteration in saved_at:
                    if iteration % steps:
                        raise UserError(
                            f"{name}, {iteration}, is not a multiple of gradient_accumulation_steps {steps}: the "
                            "checkpoint would lack half a step; change either"
                        )

    def _check_savers(self) -> None:
        folder = Path(self.work_dir)
        for hook in self.hooks:
            if not isinstance(hook, CheckpointHook):
                continue
            for name in ("out_dir", "published_keys"):
                if (value := getattr(hook, name)) is not None:
                    raise UserError(
                        f"default_hooks.checkpoint.{name} is {value!r}; checkpoints are folders of the work dir, where "
                        "--resume looks for them: leave it out"
                    )
            template = hook.filename_tmpl
            if not isinstance(template, str) or "{}" not in template or "/" in template:
                raise UserError(f"default_hooks.checkpoint.filename_tmpl is {template!r}; use one such as 'iter_{{}}'")
            names = re.compile(re.escape(template).replace(r"\{\}", r"\d+"))
            same_name = [path for path in folder.glob("*") if names.fullmatch(path.name)] if hook.save_optimizer else []
            if foreign := [path for path in sorted(same_name) if path.is_file()]:
                raise UserError(
                    f"{foreign[0]} is a file, and in the way of a checkpoint, which is a folder; move it away or give "
                    "another --work-dir"
                )
