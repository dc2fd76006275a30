"""A run: its stages, what their settings resolve to, and how far its run directory has them.

The training loop and the dry run ask it, so that the dry run accepts what training accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cascade import Stage
from ..config import Config, StageConfig, StageTrainConfig
from ..data.buckets import bucket_sizes
from ..data.listed import ListedShard
from ..data.source import Split, count_training_samples, open_data, pin_encoder, uses_text
from ..network_config import LoraConfig
from ..sizes import ImageSize
from ..words import counted
from . import checkpoint
from .deepspeed_config import json_like, resolve_deepspeed, total_batch_size
from .distillation import describe_distillation
from .engine import choose_accelerator
from .length import planned_epochs, planned_steps, steps_of_epochs
from .perceptual import describe_perceptual
from .plan import this_machine
from .resume import check_resuming, check_trained, settings_of, without_deepspeed
from .run_config import write_config
from .run_lock import check_side_by_side, holder
from .stage_setup import plan, resolve_cascade
from .validation import Part, preview_sampling

FindCheckpoint = Callable[[StageConfig], tuple[Path | None, dict[str, Any] | None]]
"""The checkpoint of a stage to resume from, and its state.json."""
PARTS: dict[Part, str] = {"validation": "validation", "samples": "preview grid"}


class Run:
    """The stages of a run directory. stage: the one to train, or "all".

    Raises ValueError for configurations that contradict themselves or the data.
    """

    def __init__(self, config: Config, run_dir: str | Path | None, stage: str) -> None:
        self.config = resolve_cascade(config)
        self.settings = self.config.fastimagen.train
        self.folder = Path(run_dir or self.settings.run)
        self.cascade, self.stages = plan(self.config, stage)
        self.where = this_machine()
        """The processes of the run. Who trains, or plans for other machines, sets it first."""
        self.samples: int | None = None  # training samples, counted when a stage is given in epochs
        self.trust_manifests = False  # whether a process of this run has compared them with the shards
        self.newest: dict[str, Path | None] = {}  # by stage: the checkpoint to resume from
        self.done: dict[str, tuple[int, int]] = {}  # by stage: its steps and the samples that they have read
        self.unfinished: dict[str, list[Part]] = {}  # by stage: what its last step still has to do

    def steps(self, config: StageConfig, world_size: int) -> int:
        """The optimizer steps of a stage. Epochs are counted in the samples of the shards."""
        epochs = planned_epochs(self.settings, config.name)
        if epochs is None:
            return planned_steps(self.settings, config.name)
        if mixture := self.config.fastimagen.data.mixture:
            raise ValueError(
                f"{config.name}: epochs {epochs:g} have no meaning for a mixture of {len(mixture)} data sets, each of "
                f"which has epochs of its own (records of training have them): give fastimagen.train.steps instead"
            )
        if self.samples is None:
            self.samples = count_training_samples(self.config.fastimagen, trust=self.trust_manifests)
        override = self.stage_settings(config).deepspeed
        batch_size = total_batch_size(self.config.deepspeed, override, world_size)
        return steps_of_epochs(epochs, self.samples, batch_size, done=self.done.get(config.name, (0, 0)))

    def resolve(self, config: StageConfig, world_size: int, device: str) -> tuple[dict[str, Any], list[str]]:
        """The stage's DeepSpeed configuration, and a line for everything that was resolved."""
        choose_accelerator()
        deepspeed, notices = resolve_deepspeed(
            self.config.deepspeed,
            self.stage_settings(config).deepspeed,
            steps=self.steps(config, world_size),
            world_size=world_size,
            cuda=device == "cuda",
            tensorboard=str(self.folder / "tensorboard"),
            job_name=config.name,
        )
        if device == "cuda":
            notices.append(f"train.cudnn_benchmark: {json_like(self.settings.cudnn_benchmark)}")
        elif self.settings.compile:
            notices.append("train.compile: null (no CUDA)")
        epochs = planned_epochs(self.settings, config.name)
        if epochs is not None:
            batch = deepspeed["train_batch_size"]
            steps = self.steps(config, world_size)
            length = f"{counted(epochs, 'epoch')} of {counted(self.samples or 0, 'sample')} in batches of {batch}"
            notices.append(f"{length}: {counted(steps, 'step')}")
        if self.config.fastimagen.data.validation is None:
            notices.append("no validation data: no val_loss, and preview grids show the first training captions")
        if self.settings.distill is not None:
            notices.append(describe_distillation(config, self.settings.distill))
        elif config.objective.perceptual is not None:
            notices.append(describe_perceptual(config))
        steps, preview_steps = config.sampling.steps, preview_sampling(config).steps
        if preview_steps < steps:
            notices.append(f"preview grids take {preview_steps} sampling steps, not the stage's {steps}")
        return deepspeed, notices

    def stage_settings(self, config: StageConfig) -> StageTrainConfig:
        """train.stages.NAME."""
        return self.settings.stages.get(config.name, StageTrainConfig())

    def lora(self, config: StageConfig) -> LoraConfig | None:
        """The adapters that a stage trains; None if it trains its whole network."""
        return self.stage_settings(config).lora

    def sizes(self, config: StageConfig) -> list[ImageSize]:
        """The sizes of data.buckets for a stage; none without buckets."""
        return bucket_sizes(self.config.fastimagen, config)

    def checkpoints(self, config: StageConfig) -> Path:
        """The folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / config.name

    @cached_property
    def data(self) -> tuple[Split, Split | None]:
        """The training and validation samples of all stages."""
        config = self.config.fastimagen
        return open_data(config, with_text=uses_text(config), trust=self.trust_manifests)

    def has_data(self) -> bool:
        """Open the data, which compares manifests with shards and embeddings. False if that fails: who needs them says
        why, and nobody does if all stages are trained."""
        try:
            return bool(self.data)
        except (ValueError, OSError, ImportError):
            return False

    def _training_shards(self) -> list[ListedShard] | None:
        """None for built-in shapes that are not rendered yet, which a dry run does not do."""
        try:
            return self.data[0].shards
        except ValueError:
            if self.config.fastimagen.data.shapes is None:
                raise
            return None

    def check_run(self, find: FindCheckpoint) -> dict[str, list[str]]:
        """What to say, by stage, about the checkpoints that the run directory has.

        Raises ValueError for changes that cannot be resumed with.
        """
        states = {}
        for config in self.stages:
            self.newest[config.name], state = find(config)
            if state:
                states[config.name] = state
                self.done[config.name] = state["step"], state["samples"]
                self.unfinished[config.name] = state["unfinished"]
        if states:
            self.pin_text_encoder()
        notices = {
            config.name: self._check_resuming(config, states[config.name]) if config.name in states else []
            for config in self.stages
        }
        if all(map(self.is_trained, self.stages)):
            return notices
        first = self.stages[0].name  # before which the others are named
        for config in self._others():
            if newest := checkpoint.newest(self.checkpoints(config)):
                state = checkpoint.read_state(newest)
                saved = without_deepspeed(state["settings"])
                now = without_deepspeed(self.resume_settings(config, {}, None))
                notices[first] += check_trained(newest, config.name, saved, now, step=state["step"])
        return notices

    def pin_text_encoder(self) -> None:
        """Let the settings name the commit of a text encoder on the hub, unless nothing is left to train with it."""
        if not all(map(self.is_trained, self.stages)):
            self.config = self.config.model_copy(update={"fastimagen": pin_encoder(self.config.fastimagen)})

    def left_to_train(self) -> list[str]:
        """The stages, besides those of this run, whose checkpoints have not reached their last step."""
        left = []
        for config in self._others():
            newest = checkpoint.newest(self.checkpoints(config))
            done = checkpoint.read_state(newest)["step"] if newest else 0
            if done < self.steps(config, self.where.processes):
                left.append(config.name)
        return left

    def is_trained(self, config: StageConfig) -> bool:
        """Whether nothing of a stage is left to do."""
        if self.unfinished.get(config.name):
            return False
        return self.done.get(config.name, (0, 0))[0] >= self.steps(config, self.where.processes)

    def look_for_checkpoint(self, config: StageConfig) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest intact checkpoint and its state, found by this process alone and without changing anything."""
        newest = checkpoint.newest_intact(self.checkpoints(config))
        return newest, checkpoint.read_state(newest) if newest else None

    def _check_resuming(self, config: StageConfig, state: dict[str, Any]) -> list[str]:
        """What to say about the checkpoint of a stage. Raises ValueError for changes that cannot be resumed with."""
        name, saved, step = config.name, state["settings"], state["step"]
        newest = self.newest[name]
        assert newest is not None
        deepspeed, _ = self.resolve(config, self.where.processes, self.where.device)
        if self.is_trained(config):
            now = self.resume_settings(config, deepspeed, None)
            trained = f"{name}: trained ({counted(step, 'step')})"
            return [trained, *check_trained(newest, name, saved, now, step=step)]
        now = self.resume_settings(config, deepspeed, self._training_shards())
        if "data.samples" not in now:
            saved.pop("data.samples", None)
        lines = check_resuming(newest, name, saved, now, step=step, samples=state["samples"])
        still = " and ".join(PARTS[part] for part in self.unfinished[name])
        return [f"{name}: resuming from step {step}{still and f', with its {still}'}", *lines]

    def resume_settings(
        self, config: StageConfig, deepspeed: dict[str, Any], shards: list[ListedShard] | None
    ) -> dict[str, Any]:
        """What a checkpoint keeps to compare with. shards: of the training samples; None leaves them out."""
        return settings_of(
            self.config.fastimagen,
            config,
            steps=self.steps(config, self.where.processes),
            epochs=planned_epochs(self.settings, config.name),
            lowres_size=Stage(config, self.cascade.below(config.name)).lowres_size,
            deepspeed=deepspeed,
            processes=self.where.processes,
            shards=shards,
        )

    def write_config(self) -> None:
        """Write config.json, if a stage will train with it."""
        if all(map(self.is_trained, self.stages)):
            return
        check_side_by_side(self.folder, [config.name for config in self._others()], self.config.to_json())
        idle = [config for config in self.stages if self.is_trained(config)]
        idle += [config for config in self._others() if not holder(self.folder, config.name)]
        found = {config.name: path for config in idle if (path := checkpoint.newest(self.checkpoints(config)))}
        write_config(self.folder, self.config, {name: checkpoint.read_state(path) for name, path in found.items()})

    def _others(self) -> list[StageConfig]:
        """The stages that are not to be trained now."""
        return [config for config in self.cascade.stages if config not in self.stages]
