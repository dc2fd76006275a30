"""The training loop: the stages in order, each with a DeepSpeed engine of its own.

To resume, rerun the command. The random numbers of a sample are a function of (seed, stage, position), the sample
itself of (seed, position): a run computes the same on any number of ranks, and after it was killed and resumed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..cascade import Stage
from ..config import Config, StageConfig
from ..data.embedding import embed_all, is_embedded
from ..data.indexing import index_share
from ..data.loader import Loader
from ..data.prepare import prepare_shapes
from ..data.source import Split, empty_text, uses_text
from ..networks.parameters import muon_parameters
from ..seeds import mix_seed
from . import checkpoint, snapshots
from .agreement import (
    agree_on_checkpoint,
    agree_on_run_directory,
    agree_on_samples,
    decide_on_first_rank,
    on_first_rank,
    raise_together,
)
from .averages import Averages
from .checkpoint_writer import CheckpointWriter
from .ema import EMA
from .engine import backend, init_distributed, make_engine
from .engine_state import load
from .flat_weights import FlatWeights
from .learning_rate import set_learning_rate
from .metrics import Metrics
from .objective import Objective, objectives
from .phases import Phases
from .plan import Target, describe, headline, this_machine
from .preemption import StopRequest, TrainingInterrupted
from .profiler import StepProfiler
from .rendezvous import meet
from .resume import describe_samples
from .run import Run
from .run_lock import shared_lock, stage_lock
from .skipped import Skipped, explain_skipped
from .speed import Speed, engine_precision, peak_memory_gib
from .stage_setup import initial_unet
from .validation import Part, Validated, Validator
from .watchdog import Watchdog


class TrainingDiverged(Exception):
    """Loss or gradient was not finite in too many consecutive steps."""


class Trainer:
    """Trains the stages of a cascade into a run directory.

    Raises ValueError, at construction or in `fit`, for configurations and data that do not fit together.
    """

    def __init__(self, config: Config, run_dir: str | Path | None = None, *, stage: str = "all") -> None:
        self.run = Run(config, run_dir, stage)
        self.config, self.settings = self.run.config, self.run.settings
        self.run_dir, self.cascade, self.stages = self.run.folder, self.run.cascade, self.run.stages
        self.phases = Phases()

    def describe(self, where: Target | None = None) -> str:
        """What `fit` would do and need: the stages, the DeepSpeed configuration of each, a table, the whole file.

        where: the processes and their GPU, which need not be here; by default this machine. Writes nothing. Raises
        ValueError also where the run directory has checkpoints that `fit` would not resume from.
        """
        self.run.where = where or this_machine()
        resuming = [line for lines in self.run.check_run(self.run.look_for_checkpoint).values() for line in lines]
        lines = describe(self.stages, self.run.where, self.run.resolve, self.run.steps, self.run.lora, self.run.sizes)
        return "\n".join([*resuming, *lines, self.config.to_json()])

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
            self.run.where = Target(self.world_size, self.device.type)
            with ExitStack() as held:
                on_first_rank(lambda: held.enter_context(self._lock()))
                self._fit_stages(stop)

    def _fit_stages(self, stop: StopRequest) -> None:
        self.token = agree_on_run_directory(self.run_dir)
        on_first_rank(self._prepare_shapes)
        self._index_shards()
        notices = self.run.check_run(self._agree_on_checkpoint)
        self.run.pin_text_encoder()
        on_first_rank(self.run.write_config)
        for config in self.stages:
            self._print(*notices.pop(config.name))
            if not self.run.is_trained(config):
                self._fit_stage(config, self.run.newest[config.name], stop)
        self._say_what_next()

    def _fit_stage(self, config: StageConfig, resume_from: Path | None, stop: StopRequest) -> None:
        """Train one stage from a checkpoint, or from the start, to its last step."""
        settings, steps, phases = self.settings, self.run.steps(config, self.world_size), self.phases
        phases.begin_stage(config.name)
        stage = Stage(config, self.cascade.below(config.name), empty_text=empty_text(self.config.fastimagen))
        train_data, _ = self.run.data
        agree_on_samples(describe_samples(train_data.shards))
        self._print(*train_data.describe_mixture())
        engine, deepspeed = self._make_engine(config)
        dtype = next(engine.module.parameters()).dtype
        objective_at = objectives(stage, settings, steps, self.device, dtype)
        accumulation_steps = deepspeed["gradient_accumulation_steps"]
        weights = FlatWeights(engine)
        ema = EMA(weights.shards, self.run.stage_settings(config).ema or settings.ema)
        start_step, samples, averages = 0, 0, Averages(self.device)
        if resume_from:
            state = load(resume_from, engine, weights, ema)
            start_step, samples = state["step"], state["samples"]
            averages = Averages(self.device, state["averages"])
        loader = self._loader(train_data, config, deepspeed)
        self._print(*(f"{config.name}: {line}" for line in loader.describe_buckets()))
        metrics = Metrics(
            self.run_dir, stage=config.name, steps=steps, start=start_step, rank=self.rank, monitor=engine.monitor
        )
        saver = CheckpointWriter(
            self.run.checkpoints(config), self.token, keep=settings.keep_checkpoints, keep_every=settings.keep_every
        )
        on_first_rank(lambda: snapshots.remove_later(self.run.checkpoints(config), start_step))
        unfinished = self.run.unfinished.get(config.name, [])
        on_first_rank(lambda: metrics.drop_later_records(keep_validation="validation" not in unfinished))
        validator = self._validator(stage, objective_at, metrics, stop)
        speed = self._speed(config, engine, metrics, loader)
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
                    engine.backward(batch.weighted(losses).mean())
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
                    counters = loader.counters | loader.mixture_values(samples)
                    counters["checkpoint_failures"] = saver.failures
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
        with stage_lock(self.run_dir, [config.name for config in self.stages], self.config.to_json()):
            yield

    def _validator(
        self, stage: Stage, objective_at: Callable[[int], Objective], metrics: Metrics, stop: StopRequest
    ) -> Validator:
        return Validator(
            self.config,
            stage,
            objective_at,
            self.run.data,
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

    def _prepare_shapes(self) -> None:
        """Render and embed the built-in shapes if the configuration asks for them."""
        config = self.config.fastimagen
        if config.data.shapes is not None:
            with shared_lock(self.run_dir, "data"):  # stages that start at the same time need them once
                prepare_shapes(config, say=print)
                if uses_text(config) and not is_embedded(config):
                    embed_all(config, say=print)

    def _index_shards(self) -> None:
        """Bring the manifests of the shards up to date, all ranks together; the first one compares them all."""
        config = self.config.fastimagen
        if self.world_size > 1:
            index_share(config, self.rank, self.world_size)
            raise_together(None)  # waits for the others
        self.run.trust_manifests = decide_on_first_rank(self.run.has_data)

    def _loader(self, data: Split, config: StageConfig, deepspeed: dict[str, Any]) -> Loader:
        """The training batches of this rank."""
        return data.loader(
            self.config.fastimagen,
            size=config.size,
            buckets=self.run.sizes(config),
            crop=config.crop,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=deepspeed["train_batch_size"],
            micro_batch=deepspeed["train_micro_batch_size_per_gpu"],
            seed=self.settings.seed,
            crop_seed=mix_seed(self.settings.seed, config.name, "crops"),
            pin=self.device.type == "cuda",
        )

    def _agree_on_checkpoint(self, config: StageConfig) -> tuple[Path | None, dict[str, Any] | None]:
        """The intact checkpoint to resume from and its state, the same on all ranks. Removes what is incomplete."""
        folder = self.run.checkpoints(config)
        on_first_rank(lambda: snapshots.clean(folder))
        newest, damaged = agree_on_checkpoint(folder)
        for line in damaged:
            self._print(f"{config.name}: {line}")
        state = decide_on_first_rank(lambda: checkpoint.read_state(newest) if newest else None)
        return newest, state

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
            "settings": self.run.resume_settings(config, deepspeed, self.run.data[0].shards),
            "world_size": self.world_size,
            "averages": averages.state(),
            "val_loss": validated.val_loss,
            "unfinished": list(validated.unfinished),
        }

    # ---- the engine

    def _make_engine(self, config: StageConfig) -> tuple[Any, dict[str, Any]]:
        """The stage's DeepSpeed engine and its resolved DeepSpeed configuration."""
        deepspeed, notices = self.run.resolve(config, self.world_size, self.device.type)
        seed = mix_seed(self.settings.seed, config.name, "weights")
        own = self.run.stage_settings(config)
        unet = initial_unet(config, seed=seed, init_from=own.init_from, lora=own.lora)
        sizes = [(weight.numel(), weight.requires_grad) for weight in unet.parameters()]
        counts = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        steps = self.run.steps(config, self.world_size)
        buckets = self.run.sizes(config)
        self._print(headline(config, counts, steps, deepspeed, self.world_size, self.device.type, buckets))
        for notice in notices:
            self._print(f"{config.name}: {notice}")
        muon = muon_parameters(unet)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = self.settings.cudnn_benchmark
            if self.settings.compile:
                unet.compile(mode=self.settings.compile)
        return make_engine(unet, deepspeed, muon), deepspeed

    # ---- reports

    def _speed(self, config: StageConfig, engine: Any, metrics: Metrics, loader: Loader) -> Speed:
        return Speed(
            config,
            batch_size=engine.train_batch_size(),
            world_size=self.world_size,
            device=self.device,
            precision=engine_precision(engine),
            say=metrics.say,
            lora=self.run.lora(config),
            samples_by_size=loader.samples_by_size(),
        )

    def _log(
        self,
        metrics: Metrics,
        averages: Averages,
        speed: Speed,
        step: int,
        engine: Any,
        counters: Mapping[str, float],
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
        left = self.run.left_to_train()
        if left:
            self._print(f"still to train: {', '.join(left)} (--stage {left[0]}, or --stage all)")
        what = "what is trained so far" if left else "the model"
        self._print(f"export {what}: fastimagen export --run {run} --out {model}")

    def _print(self, *lines: str) -> None:
        if self.rank == 0:
            for line in lines:
                print(line, flush=True)
