"""The training loop: one stage after the other, each with its own DeepSpeed engine.

To resume, run the same command again. A step's randomness is a function of (seed, stage, step, rank), its data of
(seed, epoch, position): a run that was killed and resumed is the run that was not.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..cascade import Stage
from ..config import Config, StageConfig, StageTrainConfig
from ..data.source import Split, embed_all, is_embedded, open_split, prepare_shapes
from ..networks.parameters import muon_parameters
from ..networks.unet import UNet
from ..seeds import mix_seed
from . import checkpoint
from .ema import EMA
from .engine import fp32_shards, init_distributed, make_engine, resolve_deepspeed
from .metrics import Metrics, MetricAverager
from .preemption import StopRequest, lock_run
from .stage_setup import check_same_stage, initial_unet, plan
from .validation import sample_grid, validation_loss


class TrainingInterrupted(Exception):
    """The run was asked to stop; its state is saved."""


class TrainingDiverged(Exception):
    """Loss or gradient was not finite in too many steps in a row."""


class Trainer:
    """Trains the stages of a cascade into a run directory.

    `fit()` returns when all stages are trained; it raises TrainingInterrupted after a signal (everything is saved), ValueError for
    what the user can mend, OSError when a checkpoint cannot be written, TrainingDiverged when the gradient stays non-finite.
    """

    def __init__(self, config: Config, run_dir: str | Path | None = None, *, stage: str = "all") -> None:
        self.config = config
        self.settings = config.fastimagen.train
        self.run_dir = Path(run_dir or self.settings.run)
        self.cascade, self.stages = plan(config, stage)

    def describe(self) -> str:
        """What `fit()` would run: the stages, the DeepSpeed configuration of each, the whole file. Writes nothing."""
        lines = []
        world, device = int(os.environ.get("WORLD_SIZE", "1")), "cuda" if torch.cuda.is_available() else "cpu"
        for config in self.stages:
            deepspeed, notices = self._resolve(config, world, device)
            with torch.device("meta"):
                lines.append(self._headline(config, UNet(config.unet), deepspeed, world, device))
            lines += [f"{config.name}: {notice}" for notice in notices]
            lines.append(f"{config.name}: DeepSpeed {json.dumps(deepspeed)}")
        return "\n".join([*lines, self.config.to_json()])

    def fit(self) -> None:
        self.device = init_distributed()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_run(self.run_dir) if self.rank == 0 else None
        try:
            if self.rank == 0:
                self._make_shapes()
            dist.barrier()
            newest = [self._newest(config) for config in self.stages]  # all fit, or nothing in the run is touched
            if self.rank == 0:
                (self.run_dir / "config.json").write_text(self.config.to_json())
            with StopRequest() as stop:
                for config, resume_from in zip(self.stages, newest):
                    self._fit_stage(config, resume_from, stop)
        finally:
            if lock:
                lock.close()

    def _fit_stage(self, config: StageConfig, newest: Path | None, stop: StopRequest) -> None:
        """Train one stage from checkpoint `newest`, or from the start, to its last step."""
        settings, here = self.settings, self._train_config(config)
        steps = here.steps
        if newest and checkpoint.read_state(newest)["step"] >= steps:
            self._say(f"{config.name}: trained ({steps} steps)")
            return
        stage = Stage(config, self.cascade.below(config.name))
        train, validation = self._open_data()
        engine, deepspeed = self._make_engine(config)
        ema = EMA(fp32_shards(engine), here.ema)
        start, window, bad_in_a_row = 0, MetricAverager(self.device), 0
        if newest:
            state = checkpoint.load(newest, engine, ema)
            start, window = state["step"], MetricAverager.resume(self.device, state["window"], self.rank)
            self._say(f"{config.name}: resuming from step {start}")
        accumulation = deepspeed["gradient_accumulation_steps"]
        loader = train.loader(
            self.config.fastimagen,
            size=config.size,
            crop=config.crop,
            rank=self.rank,
            world_size=self.world,
            global_batch=deepspeed["train_batch_size"],
            micro_batch=deepspeed["train_micro_batch_size_per_gpu"],
            seed=settings.seed,
        )
        metrics = Metrics(
            self.run_dir, stage=config.name, steps=steps, start=start, rank=self.rank, monitor=engine.monitor
        )
        batches = loader.batches(start)
        try:
            for step in range(start + 1, steps + 1):
                skipped, loss_sum, waited = engine.skipped_steps, 0.0, 0.0
                for micro in range(accumulation):
                    began = time.perf_counter()
                    batch = next(batches)
                    images = batch.images.to(self.device, non_blocking=True)  # (b, C, S, S)
                    text = batch.text.to(device=self.device) if config.unet.text_dim else None
                    waited += time.perf_counter() - began
                    loss = stage.training_loss(engine, images, text, self._generator(config, step, micro)).mean()
                    engine.backward(loss)
                    engine.step()
                    loss_sum = loss_sum + loss.detach() / accumulation
                if engine.skipped_steps > skipped:
                    bad_in_a_row += 1
                    self._refuse_nonfinite(bad_in_a_row, config, step)
                else:
                    bad_in_a_row = 0
                    ema.update(step - engine.skipped_steps)
                    window.add(loss_sum, deepspeed["train_batch_size"], waited)
                metrics.advance()
                if step % settings.log_every == 0 or step == steps:
                    window = self._log(metrics, window, step, engine, loader)
                if validation and (step % settings.validate_every == 0 or step == steps):
                    loss = validation_loss(stage, engine, ema, validation, self.config, self.device)
                    metrics.write(step, val_loss=loss)
                if validation and (step % settings.sample_every == 0 or step == steps):
                    sample_grid(
                        stage,
                        engine,
                        ema,
                        validation,
                        self.config,
                        self.device,
                        self.run_dir / "samples" / config.name / f"step-{step:08d}.png",
                    )
                reason = stop.should_stop()
                if reason or step == steps or step % settings.checkpoint_every == 0:
                    checkpoint.save(
                        self._folder(config), engine, ema, self._state(config, step, window), settings.keep_checkpoints
                    )
                if reason:
                    raise TrainingInterrupted(f"{reason}: saved {config.name} at step {step}; the same command resumes")
        finally:
            batches.close()
            metrics.close()
            engine.destroy()

    # ---- the parts of a stage, in the order in which they are needed

    def _make_shapes(self) -> None:
        """The built-in shapes, and only they, are rendered and embedded by training itself."""
        ours = self.config.fastimagen
        if ours.data.shapes is not None:
            prepare_shapes(ours, say=print)
            if not is_embedded(ours):
                embed_all(ours, say=print)

    def _folder(self, config: StageConfig) -> Path:
        return self.run_dir / "checkpoints" / config.name

    def _newest(self, config: StageConfig) -> Path | None:
        """The checkpoint to resume from, after clearing what a killed save left. All processes see the same one."""
        folder = self._folder(config)
        if self.rank == 0:
            checkpoint.remove_incomplete(folder)
        dist.barrier()
        newest = checkpoint.newest(folder)
        if newest:
            check_same_stage(checkpoint.read_state(newest)["stage"], config, newest)
        return newest

    def _open_data(self) -> tuple[Split, Split | None]:
        ours = self.config.fastimagen
        text = bool(next((stage for stage in self.cascade.stages if stage.unet.text_dim), None))
        train = open_split(ours.data.shards, ours, with_text=text)
        return train, open_split(ours.data.validation, ours, with_text=text) if ours.data.validation else None

    def _train_config(self, config: StageConfig) -> StageTrainConfig:
        """train.stages of this stage, with what it leaves open filled in."""
        here = self.settings.stages.get(config.name, StageTrainConfig())
        return here.model_copy(
            update={"steps": here.steps or self.settings.steps, "ema": here.ema or self.settings.ema}
        )

    def _resolve(self, config: StageConfig, world: int, device: str) -> tuple[dict[str, Any], list[str]]:
        here = self._train_config(config)
        deepspeed, notices = resolve_deepspeed(
            self.config.deepspeed,
            here.deepspeed,
            steps=here.steps,
            world_size=world,
            cuda=device == "cuda",
            tensorboard=str(self.run_dir / "tensorboard"),
            job_name=config.name,
        )
        if self.settings.compile and device != "cuda":
            notices.append("train.compile: null (no CUDA)")
        return deepspeed, notices

    def _headline(self, config: StageConfig, unet: UNet, deepspeed: dict[str, Any], world: int, device: str) -> str:
        millions = sum(p.numel() for p in unet.parameters()) / 1e6
        return (
            f"{config.name}: {config.size}x{config.size}, {millions:.2f} M parameters, "
            f"{self._train_config(config).steps} steps of {deepspeed['train_batch_size']} images "
            f"on {world} x {device}"
        )

    def _make_engine(self, config: StageConfig) -> tuple[Any, dict[str, Any]]:
        deepspeed, notices = self._resolve(config, self.world, self.device.type)
        unet = initial_unet(
            config,
            seed=mix_seed(self.settings.seed, config.name, "weights"),
            init_from=self._train_config(config).init_from,
        )
        for line in [
            self._headline(config, unet, deepspeed, self.world, self.device.type),
            *(f"{config.name}: {notice}" for notice in notices),
        ]:
            self._say(line)
        if self.settings.compile and self.device.type == "cuda":
            unet.compile(mode=self.settings.compile)
        return make_engine(unet, deepspeed, muon_parameters(unet)), deepspeed

    def _generator(self, config: StageConfig, step: int, micro: int) -> torch.Generator:
        seed = mix_seed(self.settings.seed, config.name, step, micro, self.rank)
        return torch.Generator(self.device).manual_seed(seed)

    def _log(self, metrics: Metrics, window: MetricAverager, step: int, engine: Any, loader: Any) -> MetricAverager:
        """Write the record of the steps since the last one and begin the next window."""
        if window.steps:
            dist.all_reduce(window.loss)
            seconds = time.perf_counter() - window.since
            memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else _peak_rss_gib()
            metrics.write(
                step,
                loss=window.loss.item() / self.world / window.steps,
                lr=engine.get_lr()[0],
                grad_norm=float(engine.get_global_grad_norm()),
                images_per_s=window.images / seconds,
                data_wait=window.data_wait / seconds,
                memory_gib=memory,
                nonfinite_steps=engine.skipped_steps,
                **loader.counters,
            )
        return MetricAverager(self.device)

    def _refuse_nonfinite(self, in_a_row: int, config: StageConfig, step: int) -> None:
        self._say(f"{config.name} {step}: non-finite gradient, step skipped ({in_a_row} in a row)")
        if in_a_row >= self.settings.max_nonfinite:
            raise TrainingDiverged(
                f"{config.name}: the gradient was not finite in {in_a_row} steps in a row up to step "
                f"{step}; lower the learning rate, or look at the data. Checkpoints before are intact"
            )

    def _state(self, config: StageConfig, step: int, window: MetricAverager) -> dict[str, Any]:
        return {
            "step": step,
            "stage": config.model_dump(mode="json"),
            "world_size": self.world,
            "window": window.state(),
        }

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def _peak_rss_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
