"""The training loop: the stages in order, each with a DeepSpeed engine of its own.

To resume, rerun the command. The random numbers of a sample are a function of (seed, stage, position), the sample
itself of (seed, position): a run computes the same on any number of ranks, and after it was killed and resumed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..cascade import Stage
from ..config import Config, StageConfig, StageTrainConfig
from ..data.loader import Loader
from ..data.shards import Shard
from ..data.source import Split, count_training_samples, embed_all, is_embedded, open_data, prepare_shapes, uses_text
from ..networks.parameters import muon_parameters
from ..seeds import mix_seed
from . import checkpoint, snapshots
from .agreement import agree_on_checkpoint, agree_on_run_directory, decide_on_first_rank, on_first_rank
from .averages import Averages
from .checkpoint_writer import CheckpointWriter
from .deepspeed_config import json_like, resolve_deepspeed, total_batch_size
from .distillation import describe_distillation
from .ema import EMA
from .engine import backend, choose_accelerator, init_distributed, make_engine
from .engine_state import load
from .flat_weights import FlatWeights
from .learning_rate import set_learning_rate
from .length import planned_epochs, planned_steps, steps_of_epochs
from .metrics import Metrics
from .objective import Objective, objectives
from .phases import Phases
from .plan import Target, describe, headline, this_machine
from .preemption import StopRequest, TrainingInterrupted
from .profiler import StepProfiler
from .rendezvous import meet
from .resume import check_resuming, check_trained, settings_of, without_deepspeed
from .run_lock import shared_lock, stage_lock, write_config
from .skipped import Skipped, explain_skipped
from .speed import Speed, engine_precision, peak_memory_gib
from .stage_setup import initial_unet, plan, resolve_cascade
from .validation import Part, Validated, Validator, preview_sampling
from .watchdog import Watchdog


class TrainingDiverged(Exception):
    """Loss or gradient was not finite in too many consecutive steps."""


class Trainer:
    """Trains the stages of a cascade into a run directory.

    Raises ValueError, at construction or in `fit`, for configurations and data that do not fit together.
    """

    def __init__(self, config: Config, run_dir: str | Path | None = None, *, stage: str = "all") -> None:
        self.config = resolve_cascade(config)
        self.settings = self.config.fastimagen.train
        self.run_dir = Path(run_dir or self.settings.run)
        self.cascade, self.stages = plan(self.config, stage)
        self.phases = Phases()
        self.samples: int | None = None  # training samples, counted when a stage is given in epochs
        self.progress: dict[str, tuple[int, int]] = {}  # by stage: steps taken and samples read when it resumes
        self.unfinished: dict[str, list[Part]] = {}  # by stage: what its checkpoint's step still has to do

    def describe(self, where: Target | None = None) -> str:
        """What `fit` would do and need: the stages, the DeepSpeed configuration of each, a table, the whole file.

        where: the processes and their GPU, which need not be here; by default this machine. Writes nothing.
        """
        lines = describe(self.stages, where or this_machine(), self._resolve, self._steps)
        return "\n".join([*lines, self.config.to_json()])

    def fit(self) -> None:
        """Train all stages.

        Raises TrainingInterrupted after a signal, when a checkpoint is saved; TrainingDiverged if the gradient stays
        non-finite; OSError if a checkpoint cannot be written or the processes cannot reach each other; ValueError for
        what the user can correct.
        """
        timeouts = self.settings.timeouts
        peers = meet(timeouts.rendezvous, backend=backend())
        with StopRequest(peers, self.phases) as stop, Watchdog(peers, self.phases, timeouts, stop):
            self.device = init_distributed(timeouts, peers)
            if self.device.type == "cuda":
                self.phases.use_device_clock()
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            with ExitStack() as held:
                on_first_rank(lambda: held.enter_context(self._lock()))
                self._fit_stages(stop)

    def _fit_stages(self, stop: StopRequest) -> None:
        self.token = agree_on_run_directory(self.run_dir)
        on_first_rank(self._prepare_shapes)
        newest = {config.name: self._newest_checkpoint(config) for config in self.stages}
        notices = {config.name: self._check_resuming(config, newest[config.name]) for config in self.stages}
        on_first_rank(self._write_config)
        for config in self.stages:
            self._print(*notices[config.name])
            if not self._is_trained(config):
                self._fit_stage(config, newest[config.name], stop)
        self._say_what_next()

    def _fit_stage(self, config: StageConfig, resume_from: Path | None, stop: StopRequest) -> None:
        """Train one stage from a checkpoint, or from the start, to its last step."""
        settings, steps, phases = self.settings, self._steps(config, self.world_size), self.phases
        phases.begin_stage(config.name)
        stage = Stage(config, self.cascade.below(config.name))
        train_data, _ = self._data
        engine, deepspeed = self._make_engine(config)
        dtype = next(engine.module.parameters()).dtype
        objective_at = objectives(stage, settings, steps, self.device, dtype)
        accumulation_steps = deepspeed["gradient_accumulation_steps"]
        weights = FlatWeights(engine)
        ema = EMA(weights.shards, self._stage_settings(config).ema or settings.ema)
        start_step, samples, averages = 0, 0, Averages(self.device)
        if resume_from:
            state = load(resume_from, engine, weights, ema)
            start_step, samples = state["step"], state["samples"]
            averages = Averages(self.device, state["averages"])
        loader = self._loader(train_data, config, deepspeed)
        metrics = Metrics(
            self.run_dir, stage=config.name, steps=steps, start=start_step, rank=self.rank, monitor=engine.monitor
        )
        saver = CheckpointWriter(
            self._checkpoints(config), self.token, keep=settings.keep_checkpoints, keep_every=settings.keep_every
        )
        unfinished = self.unfinished.get(config.name, [])
        on_first_rank(lambda: metrics.drop_later_records(keep_validation="validation" not in unfinished))
        validator = self._validator(stage, objective_at, metrics, stop)
        speed = self._speed(config, engine, metrics)
        profiler = StepProfiler(self.run_dir, config.name, settings.profile if self.rank == 0 else 0, metrics.say)
        nonfinite_in_a_row = 0
        phases.take_seconds()  # the records count the time from here on
        batches = loader.batches(samples)
        try:
            if resume_from and unfinished:
                phases.enter("validation", start_step)
                self._finish_step(resume_from, validator.run(start_step, unfinished, weights, ema, dtype))
            for step in range(start_step + 1, steps + 1):
                phases.enter("data", step)
                skipped_before, micro_batches = engine.skipped_steps, []
                objective = objective_at(step)
                lr = set_learning_rate(engine, step - engine.skipped_steps)
                for _ in range(accumulation_steps):
                    phases.enter("data")
                    batch = next(batches)
                    images = batch.images_for(self.device)  # (B, C, H, W)
                    text = batch.text_for(config.unet, self.device)
                    phases.enter("forward")
                    draws = stage.draw(settings.seed, batch.positions.tolist(), images)
                    losses = objective.training_loss(engine, images, text, draws)  # (B,)
                    phases.enter("backward")
                    engine.backward(losses.mean())
                    phases.enter("step")
                    engine.step()  # an optimizer step after the last micro-batch
                    averages.add(losses, objective.noise_levels(draws))
                    micro_batches.append((batch.origins, losses.detach()))
                samples += engine.train_batch_size()

                skipped = engine.skipped_steps > skipped_before
                averages.end_step(skipped=skipped)
                if skipped:
                    cause = explain_skipped(micro_batches, loader, engine)
                    nonfinite_in_a_row += cause.diverges
                    self._report_skipped(metrics, step, cause, engine, nonfinite_in_a_row)
                else:
                    nonfinite_in_a_row = 0
                    ema.update(step - engine.skipped_steps)
                phases.enter("log")
                metrics.advance()
                profiler.step(step)

                every = (settings.log_every, settings.validate_every, settings.sample_every, settings.checkpoint_every)
                log, validate, preview, save = (step == steps or step % interval == 0 for interval in every)
                if log:
                    counters = {**loader.counters, "checkpoint_failures": saver.failures}
                    self._log(metrics, averages, speed, step, engine, counters, lr)
                    averages = Averages(self.device)
                due: dict[Part, bool] = {"validation": validate, "samples": preview}
                validated = validator.run(step, [part for part in due if due[part]], weights, ema, dtype)
                reason = validated.reason or stop.should_stop()
                if reason or save:
                    phases.enter("checkpoint")
                    state = self._state(config, deepspeed, step, samples, averages, validated)
                    saver.save(engine, weights, ema, state)
                if failure := saver.failure():
                    metrics.say(f"{config.name} {step}: {failure}")
                if reason:
                    saver.finish()
                    raise TrainingInterrupted(
                        f"{reason}: saved a checkpoint of {config.name} at step {step}; rerun the command to resume"
                    )
            phases.enter("checkpoint")
            saver.finish()
        finally:
            saver.close()
            batches.close()
            profiler.close()
            metrics.close()
            engine.destroy()

    # ---- data and checkpoints

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with stage_lock(self.run_dir, [config.name for config in self.stages]):
            yield

    def _validator(
        self, stage: Stage, objective_at: Callable[[int], Objective], metrics: Metrics, stop: StopRequest
    ) -> Validator:
        return Validator(
            self.config,
            stage,
            objective_at,
            self._data,
            self.run_dir / "samples" / stage.name,
            metrics=metrics,
            phases=self.phases,
            stop=stop,
        )

    def _finish_step(self, resumed_from: Path, validated: Validated) -> None:
        """Record what has become of what a request to stop had left to do. Raises TrainingInterrupted after another."""
        on_first_rank(lambda: checkpoint.write_validated(resumed_from, validated.val_loss, validated.unfinished))
        if validated.reason:
            raise TrainingInterrupted(f"{validated.reason}: {resumed_from} is as it was; rerun the command to resume")

    def _write_config(self) -> None:
        """Write config.json, if a stage will train with it, and say what it changes for stages that do not."""
        if all(map(self._is_trained, self.stages)):
            return
        others = [config for config in self.cascade.stages if config not in self.stages]
        for config in others:
            self._print(*self._check_resuming(config, checkpoint.newest(self._checkpoints(config)), selected=False))
        write_config(self.run_dir, self.config.to_json(), [config.name for config in others])

    @cached_property
    def _data(self) -> tuple[Split, Split | None]:
        """The training and validation samples of all stages."""
        return open_data(self.config.fastimagen, with_text=uses_text(self.config.fastimagen))

    def _prepare_shapes(self) -> None:
        """Render and embed the built-in shapes if the configuration asks for them."""
        config = self.config.fastimagen
        if config.data.shapes is not None:
            with shared_lock(self.run_dir, "data"):  # stages that start at the same time need them once
                prepare_shapes(config, say=print)
                if uses_text(config) and not is_embedded(config):
                    embed_all(config, say=print)

    def _loader(self, data: Split, config: StageConfig, deepspeed: dict[str, Any]) -> Loader:
        """The training batches of this rank."""
        return data.loader(
            self.config.fastimagen,
            size=config.size,
            crop=config.crop,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=deepspeed["train_batch_size"],
            micro_batch=deepspeed["train_micro_batch_size_per_gpu"],
            seed=self.settings.seed,
            crop_seed=mix_seed(self.settings.seed, config.name, "crops"),
            pin=self.device.type == "cuda",
        )

    def _checkpoints(self, config: StageConfig) -> Path:
        return self.run_dir / "checkpoints" / config.name

    def _newest_checkpoint(self, config: StageConfig) -> Path | None:
        """The intact checkpoint to resume from, the same one on all ranks, after removing incomplete ones."""
        folder = self._checkpoints(config)
        on_first_rank(lambda: snapshots.clean(folder))
        newest, damaged = agree_on_checkpoint(folder)
        for line in damaged:
            self._print(f"{config.name}: {line}")
        if newest:
            state = decide_on_first_rank(lambda: checkpoint.read_state(newest))
            self.progress[config.name] = state["step"], state["samples"]
            self.unfinished[config.name] = state["unfinished"]
        step = self.progress.get(config.name, (0, 0))[0]
        on_first_rank(lambda: snapshots.remove_later(folder, step))
        return newest

    def _is_trained(self, config: StageConfig) -> bool:
        if self.unfinished.get(config.name):
            return False
        return self.progress.get(config.name, (0, 0))[0] >= self._steps(config, self.world_size)

    def _check_resuming(self, config: StageConfig, newest: Path | None, *, selected: bool = True) -> list[str]:
        """What to say about the checkpoint of a stage. Raises ValueError for changes that cannot be resumed with."""
        if newest is None:
            return []
        state, name = checkpoint.read_state(newest), config.name
        saved, step = state["settings"], state["step"]
        if not selected:
            now = self._resume_settings(config, {}, None)
            return check_trained(newest, name, without_deepspeed(saved), without_deepspeed(now), step=step)
        deepspeed, _ = self._resolve(config, self.world_size, self.device.type)
        if self._is_trained(config):
            now = self._resume_settings(config, deepspeed, None)
            return [f"{name}: trained ({step} steps)", *check_trained(newest, name, saved, now, step=step)]
        now = self._resume_settings(config, deepspeed, self._data[0].shards)
        lines = check_resuming(newest, name, saved, now, step=step, samples=state["samples"])
        names = {"validation": "validation", "samples": "preview grid"}
        still = " and ".join(names[part] for part in self.unfinished[name])
        return [f"{name}: resuming from step {step}{still and f', with its {still}'}", *lines]

    def _resume_settings(
        self, config: StageConfig, deepspeed: dict[str, Any], shards: list[Shard] | None
    ) -> dict[str, Any]:
        return settings_of(
            self.config.fastimagen,
            config,
            steps=self._steps(config, self.world_size),
            epochs=planned_epochs(self.settings, config.name),
            lowres_size=Stage(config, self.cascade.below(config.name)).lowres_size,
            deepspeed=deepspeed,
            processes=self.world_size,
            shards=shards,
        )

    def _state(
        self,
        config: StageConfig,
        deepspeed: dict[str, Any],
        step: int,
        samples: int,
        averages: Averages,
        validated: Validated,
    ) -> dict[str, Any]:
        """The content of a checkpoint's state.json. samples: read since the start, the next position of the data."""
        return {
            "step": step,
            "samples": samples,
            "stage": config.model_dump(mode="json"),
            "settings": self._resume_settings(config, deepspeed, self._data[0].shards),
            "world_size": self.world_size,
            "averages": averages.state(),
            "val_loss": validated.val_loss,
            "unfinished": list(validated.unfinished),
        }

    # ---- the engine

    def _stage_settings(self, config: StageConfig) -> StageTrainConfig:
        return self.settings.stages.get(config.name, StageTrainConfig())

    def _steps(self, config: StageConfig, world_size: int) -> int:
        """The optimizer steps of a stage. Epochs are counted in the samples of the shards."""
        epochs = planned_epochs(self.settings, config.name)
        if epochs is None:
            return planned_steps(self.settings, config.name)
        if self.samples is None:
            self.samples = count_training_samples(self.config.fastimagen)
        override = self._stage_settings(config).deepspeed
        batch_size = total_batch_size(self.config.deepspeed, override, world_size)
        return steps_of_epochs(epochs, self.samples, batch_size, done=self.progress.get(config.name, (0, 0)))

    def _resolve(self, config: StageConfig, world_size: int, device: str) -> tuple[dict[str, Any], list[str]]:
        """The stage's DeepSpeed configuration, and a line for everything that was resolved."""
        choose_accelerator()
        deepspeed, notices = resolve_deepspeed(
            self.config.deepspeed,
            self._stage_settings(config).deepspeed,
            steps=self._steps(config, world_size),
            world_size=world_size,
            cuda=device == "cuda",
            tensorboard=str(self.run_dir / "tensorboard"),
            job_name=config.name,
        )
        if device == "cuda":
            notices.append(f"train.cudnn_benchmark: {json_like(self.settings.cudnn_benchmark)}")
        elif self.settings.compile:
            notices.append("train.compile: null (no CUDA)")
        epochs = planned_epochs(self.settings, config.name)
        if epochs is not None:
            batch = deepspeed["train_batch_size"]
            steps = self._steps(config, world_size)
            notices.append(f"{epochs:g} epochs of {self.samples} samples in batches of {batch}: {steps} steps")
        if self.config.fastimagen.data.validation is None:
            notices.append("no validation data: no val_loss, and preview grids show the first training captions")
        if self.settings.distill is not None:
            notices.append(describe_distillation(config, self.settings.distill))
        steps, preview_steps = config.sampling.steps, preview_sampling(config).steps
        if preview_steps < steps:
            notices.append(f"preview grids take {preview_steps} sampling steps, not the stage's {steps}")
        return deepspeed, notices

    def _make_engine(self, config: StageConfig) -> tuple[Any, dict[str, Any]]:
        """The stage's DeepSpeed engine and its resolved DeepSpeed configuration."""
        deepspeed, notices = self._resolve(config, self.world_size, self.device.type)
        seed = mix_seed(self.settings.seed, config.name, "weights")
        unet = initial_unet(config, seed=seed, init_from=self._stage_settings(config).init_from)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        steps = self._steps(config, self.world_size)
        self._print(headline(config, parameters, steps, deepspeed, self.world_size, self.device.type))
        for notice in notices:
            self._print(f"{config.name}: {notice}")
        muon = muon_parameters(unet)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = self.settings.cudnn_benchmark
            if self.settings.compile:
                unet.compile(mode=self.settings.compile)
        return make_engine(unet, deepspeed, muon), deepspeed

    # ---- reports

    def _speed(self, config: StageConfig, engine: Any, metrics: Metrics) -> Speed:
        return Speed(
            config,
            batch_size=engine.train_batch_size(),
            world_size=self.world_size,
            device=self.device,
            precision=engine_precision(engine),
            say=metrics.say,
        )

    def _log(
        self,
        metrics: Metrics,
        averages: Averages,
        speed: Speed,
        step: int,
        engine: Any,
        counters: dict[str, int],
        lr: float,
    ) -> None:
        """Write the record of the steps since the last one. All ranks call it."""
        found = averages.gather(self.phases.take_seconds(), peak_memory_gib(self.device))
        metrics.write(
            step,
            **found.losses(),
            lr=lr,
            grad_norm=float(engine.get_global_grad_norm()),
            **speed.values(averages.new_steps, found.training_seconds()),
            **found.time_shares(),
            **found.slowest_rank(),
            memory_gib=found.memory,
            skipped_steps=engine.skipped_steps,
            **metrics.seconds_left(step),
            **counters,
        )

    def _report_skipped(self, metrics: Metrics, step: int, skipped: Skipped, engine: Any, in_a_row: int) -> None:
        """Record that a step was skipped, and why. Raises TrainingDiverged after too many in a row."""
        metrics.write(step, **skipped.values(), skipped_steps=engine.skipped_steps)
        if in_a_row >= self.settings.max_nonfinite:
            raise TrainingDiverged(
                f"{metrics.stage}: the gradient was not finite in {in_a_row} consecutive steps up to step {step}, the "
                f"last because of {skipped}; {skipped.advice()}. Earlier checkpoints are intact"
            )

    def _say_what_next(self) -> None:
        """Print what there is to do with a trained run."""
        run, model = shlex.quote(str(self.run_dir)), shlex.quote(f"models/{self.run_dir.resolve().name}")
        self._print(f"sample grids: {self.run_dir / 'samples'}")
        self._print(f"draw its curves: fastimagen plot {run}")
        self._print(f"export the model: fastimagen export --run {run} --out {model}")

    def _print(self, *lines: str) -> None:
        if self.rank == 0:
            for line in lines:
                print(line, flush=True)
