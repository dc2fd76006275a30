"""What a run records: averages, time, speed, skipped steps; in the file, on the console and in monitors."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastimagen.cascade import Stage
from fastimagen.config import StageConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.source import open_data
from fastimagen.train import record_file
from fastimagen.train.averages import NOISE_BINS, NOISE_EDGES, Averages, Gathered
from fastimagen.train.metrics import Metrics, console_line, duration
from fastimagen.train.monitors import Monitors
from fastimagen.train.phases import PHASES, Phases
from fastimagen.train.profiler import WARM_UP, StepProfiler
from fastimagen.train.record_file import RecordFile
from fastimagen.train.skipped import BAD_LOSS, SCALE_SEARCH, Skipped, explain_skipped
from fastimagen.train.speed import Speed
from tests.conftest import TOY_STAGES

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def seconds(**given: float) -> dict[Any, float]:
    return {**dict.fromkeys(PHASES, 0.0), **given}


# ---- averages


def test_losses_are_averaged_by_noise_level() -> None:
    averages = Averages(CPU)
    levels = torch.tensor([0.0, 0.1, 0.3, 0.95, 0.99, 1.0], dtype=torch.float64)
    averages.add(torch.tensor([1.0, 2.0, 4.0]), levels[:3])  # two micro-batches
    averages.add(torch.tensor([8.0, 16.0, 32.0]), levels[3:])
    averages.end_step(skipped=False)
    found = averages.gather(seconds(), 0.0).losses()
    assert found == {
        "loss": 63 / 6,
        "loss/noise_0.00-0.22": 1.5,
        "loss/noise_0.22-0.52": 4.0,
        "loss/noise_0.86-0.98": 8.0,  # none in 0.52-0.86
        "loss/noise_0.98-1.00": 24.0,
    }


def test_a_skipped_step_leaves_no_trace_in_the_averages() -> None:
    averages = Averages(CPU)
    averages.add(torch.tensor([3.0]), torch.tensor([0.5]))
    averages.end_step(skipped=False)
    averages.add(torch.tensor([torch.nan, 1.0]), torch.tensor([0.5, 0.5]))
    averages.end_step(skipped=True)
    assert averages.gather(seconds(), 0.0).losses()["loss"] == 3.0
    assert (averages.steps, averages.new_steps) == (1, 2)
    assert Averages(CPU).gather(seconds(), 0.0).losses() == {}


def test_averages_resume_from_a_checkpoint_on_any_number_of_ranks() -> None:
    averages = Averages(CPU)
    averages.add(torch.tensor([1.0, 2.5]), torch.tensor([0.1, 0.9]))
    averages.end_step(skipped=False)
    state = json.loads(json.dumps(averages.state()))
    for saved in (state, {**state, "loss_sums": [[[value / 2 for value in row] for row in state["loss_sums"][0]]] * 2}):
        resumed = Averages(CPU, saved)
        resumed.add(torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.9]))
        resumed.end_step(skipped=False)
        assert resumed.gather(seconds(), 0.0).losses()["loss"] == pytest.approx(4.5 / 4, abs=1e-12)
        assert (resumed.steps, resumed.new_steps) == (2, 1)


@pytest.mark.parametrize("stage", TOY_STAGES, ids=lambda stage: stage["name"])
def test_noise_levels_are_those_of_the_loss(stage: dict) -> None:
    """The U-Net sees x_t: its spread on images of 0 is the noise level."""
    config = StageConfig.model_validate(stage)
    below = StageConfig.model_validate(TOY_STAGES[0]) if config.unet.lowres else None
    seen = []

    def unet(x: torch.Tensor, time: torch.Tensor, **condition: Any) -> torch.Tensor:
        seen.append(x)
        return x

    made = Stage(config, below)
    images = torch.zeros(64, 3, 8, 8)
    draws = made.draw(0, range(64), images)
    made.training_loss(unet, images, None, draws)  # type: ignore[arg-type]
    levels = made.noise_levels(draws)
    assert ((levels >= 0) & (levels <= 1)).all() and levels.std() > 0.2
    spread = seen[0].flatten(1).double().square().mean(dim=1).sqrt()
    assert ((spread / levels) - 1).abs().max() < 0.3  # 192 pixels: a standard deviation of 5 %


def test_time_shares_add_up_and_the_slowest_rank_is_named() -> None:
    times = torch.tensor([[1.0, 2.0, 6.0, 1.0, 0.0], [3.0, 2.0, 4.0, 1.0, 0.0]], dtype=torch.float64)
    own = seconds(data=1.0, forward=2.0, backward=6.0, step=1.0, validation=10.0)
    gathered = Gathered(torch.zeros(5, 2), times, 1.0, own)
    shares = gathered.time_shares()
    assert shares["time/other"] == 0.5 and sum(shares.values()) == pytest.approx(1.0)
    assert gathered.training_seconds() == 10.0
    assert gathered.slowest_rank() == {"slowest_rank": 1, "slowest_rank_lag": pytest.approx(0.1)}  # 5 s, mean 4, of 10
    assert Gathered(torch.zeros(5, 2), times[:1], 1.0, own).slowest_rank() == {}


def test_noise_bins_cover_all_levels_once() -> None:
    assert NOISE_BINS[0].startswith("0.00-") and NOISE_BINS[-1].endswith("-1.00")
    assert [name[5:] for name in NOISE_BINS[:-1]] == [name[:4] for name in NOISE_BINS[1:]]
    assert list(NOISE_EDGES) == sorted(NOISE_EDGES)


# ---- speed


def test_the_share_of_the_peak_rate_is_images_times_flops_by_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastimagen.train.flops import stage_flops

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = StageConfig.model_validate(TOY_STAGES[0])
    lines: list[str] = []
    settings: dict[str, Any] = {"batch_size": 64, "world_size": 8, "precision": "bf16", "say": lines.append}
    found = Speed(config, device=torch.device("cuda"), **settings).values(10, 4.0)
    assert found["images_per_s"] == 160
    assert found["mfu"] == pytest.approx(160 * stage_flops(config).training / (8 * 989e12)) and not lines
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Voodoo 2")
    assert "mfu" not in Speed(config, device=torch.device("cuda"), **settings).values(10, 4.0)
    assert lines == ["base: no share of the peak rate (mfu) in the records: that of this Voodoo 2 is unknown"]


def test_the_device_clock_gives_the_time_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for CUDA's events, one for each change of phase, 10 ms apart in the GPU's queue."""

    class Event:
        recorded = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.recorded += 1
            self.at = 10.0 * Event.recorded

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases()
    phases.use_device_clock()
    for phase in ("data", "forward", "data", "forward", "backward"):
        phases.enter(phase)  # type: ignore[arg-type]
    expected = seconds(start=0.01, data=0.02, forward=0.02, backward=0.01)
    assert phases.take_seconds() == pytest.approx(expected)
    phases.enter("step")
    assert phases.take_seconds() == pytest.approx(seconds(backward=0.01, step=0.01))


# ---- skipped steps


def engine(*, fp16: bool = False) -> Any:
    return SimpleNamespace(
        fp16_enabled=lambda: fp16, dynamic_loss_scale=lambda: True, _get_optimizer_loss_scale=lambda: 1024.0
    )


def test_a_skipped_step_names_the_samples_with_bad_embeddings(toy_config: dict[str, Any]) -> None:
    config = config_from_dict(toy_config).fastimagen
    train, _ = open_data(config, with_text=True)
    loader = train.loader(
        config, size=8, crop=None, rank=0, world_size=1, global_batch=4, micro_batch=2, seed=0, crop_seed=0
    )
    batches = loader.batches(0)
    first, second = next(batches), next(batches)
    batches.close()
    nan = torch.tensor([1.0, torch.nan])
    good = (first.origins, torch.ones(2))
    named = f'"{second.keys[1]}" of {train.shards[0].path}'
    assert explain_skipped([good, (second.origins, nan)], loader, engine()) == Skipped(BAD_LOSS, [named], None)

    shard, index = second.origins[1]
    clean = loader.caches[shard]  # type: ignore[index]

    class Damaged:
        def __len__(self) -> int:
            return len(clean)

        def caption(self, row: int, number: int) -> torch.Tensor:
            return clean.caption(row, number) * (torch.nan if row == index else 1)

    loader.caches = [Damaged() if number == shard else cache for number, cache in enumerate(loader.caches)]  # type: ignore[arg-type]
    found = explain_skipped([good, (second.origins, nan)], loader, engine(fp16=True))
    assert str(found) == f"non-finite text embeddings: {named}" and found.diverges
    assert "fastimagen embed" in found.advice()
    assert found.values() == {"skipped": "non-finite text embeddings", "samples": [named]}


def test_a_search_for_the_loss_scale_is_no_divergence() -> None:
    found = explain_skipped([((), torch.ones(2))], None, engine(fp16=True))  # type: ignore[arg-type]
    assert found == Skipped(SCALE_SEARCH, [], 1024.0) and not found.diverges
    assert (
        console_line("base 3/10", found.values()) == "base 3/10  step skipped: fp16 gradients overflow, loss scale 1024"
    )
    assert explain_skipped([((), torch.ones(2))], None, engine()).diverges  # type: ignore[arg-type]


def test_many_bad_samples_are_counted() -> None:
    found = Skipped(BAD_LOSS, [f'"{number}" of a.tar' for number in range(11)], None)
    assert str(found).endswith('"7" of a.tar and 3 more') and found.values()["samples_total"] == 11


# ---- metrics.jsonl


def write_file(folder: Path) -> tuple[RecordFile, list[str]]:
    lines: list[str] = []
    return RecordFile(folder / "metrics.jsonl", lines.append), lines


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, lines = write_file(tmp_path)
    file.append({"step": 1})
    disk_with_room(monkeypatch, 3)
    file.append({"step": 2})
    file.append({"step": 3})
    assert read(tmp_path) == [{"step": 1}], "half a record is in the file"
    monkeypatch.undo()
    file.append({"step": 4})
    assert read(tmp_path) == [{"step": step} for step in (1, 2, 3, 4)]
    file.close()
    path = tmp_path / "metrics.jsonl"
    assert lines == [
        f"cannot write {path} ([Errno 28] No space left on device): its records wait until it can be written",
        f"{path}: written again, with 3 records that waited",
    ]


def test_records_that_never_find_room_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, lines = write_file(tmp_path)
    disk_with_room(monkeypatch, 3)
    file.append({"step": 1})
    file.close()
    assert lines[-1] == f"{tmp_path}/metrics.jsonl: could not be written, and lost 1 record"


def disk_with_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Files of record_file take `room` bytes of every record, then the disk is full."""

    def open_file(*arguments: Any, **options: Any) -> Any:
        file = open(*arguments, **options)  # noqa: SIM115
        left = [room]

        class Full:
            def write(self, data: bytes) -> int:
                if not left[0]:
                    raise OSError(28, "No space left on device")
                taken = min(len(data), left[0])
                left[0] -= taken
                return file.write(data[:taken])

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *exception: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Full()

    monkeypatch.setattr(record_file, "open", open_file, raising=False)


def test_two_stages_write_at_once_while_one_drops_records(tmp_path: Path) -> None:
    base, _ = write_file(tmp_path)
    sr, _ = write_file(tmp_path)
    for step in (1, 2, 3):
        sr.append({"stage": "sr", "step": step})
        base.append({"stage": "base", "step": step})
    sr.drop_after("sr", 1)  # replaces the file
    base.append({"stage": "base", "step": 4})
    sr.append({"stage": "sr", "step": 2})
    kept = [(record["stage"], record["step"]) for record in read(tmp_path)]
    assert kept == [("sr", 1), ("base", 1), ("base", 2), ("base", 3), ("base", 4), ("sr", 2)]


def test_dropping_the_end_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write_file(tmp_path)
    for step in (1, 2, 3):
        file.append({"stage": "base", "step": step})
    with open(tmp_path / "metrics.jsonl", "a") as half:
        half.write('{"stage": "ba')
    monkeypatch.setattr(record_file, "atomic_file", None)
    file.drop_after("base", 2)
    assert [record["step"] for record in read(tmp_path)] == [1, 2]


def metrics(folder: Path, monitor: Any = None) -> Metrics:
    return Metrics(folder, stage="sr", steps=10, start=0, rank=0, monitor=monitor)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    written = metrics(tmp_path)
    written.write(4, loss=0.25, grad_norm=float("inf"), lr=float("nan"))
    written.close()
    (record,) = read(tmp_path)
    assert record == {
        "stage": "sr", "step": 4, "time": record["time"], "loss": 0.25, "grad_norm": None, "lr": None
    }  # fmt: skip


# ---- the console


def test_the_console_shows_what_a_reader_needs() -> None:
    values = {
        "loss": 0.12345, "loss/noise_0.00-0.22": 0.5, "lr": 8e-4, "grad_norm": 0.5312, "images_per_s": 412.34,
        "mfu": 0.381, "time/data": 0.021, "memory_gib": 11.23, "skipped_steps": 0, "bad": 3, "eta_s": 750.0,
        "slowest_rank": 5, "slowest_rank_lag": 0.12,
    }  # fmt: skip
    assert console_line("base 50/2000", values) == (
        "base 50/2000  loss 0.1235  lr 8.00e-04  grad 0.531  412.3 images/s  38% of peak  data 2%  11.2 GiB  "
        "12 min left  waits 12% for rank 5  bad 3"
    )
    assert console_line("base 50/2000", {"val_loss": 0.104321}) == "base 50/2000  val_loss 0.10432"


@pytest.mark.parametrize(
    ("given", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (12_300, "3 h 25 min"),
                        (370_000, "4 d 6 h")]
)  # fmt: skip
def test_durations_are_rounded_for_a_reader(given: float, text: str) -> None:
    assert duration(given) == text


def test_the_time_left_leaves_the_first_record_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    written = metrics(tmp_path)
    assert [written.seconds_left(step) for step in (2, 4, 10)] == [{}, {"eta_s": 12.0}, {"eta_s": 0.0}]


# ---- monitors


class Board:
    """Stands for DeepSpeed's TensorBoardMonitor."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.images: list[tuple] = []
        self.summary_writer = SimpleNamespace(
            add_image=lambda name, pixels, step, dataformats: self.images.append((name, pixels.shape, step)),
            flush=lambda: None,
            close=lambda: None,
        )

    def write_events(self, events: list[tuple]) -> None:
        self.events += events


def test_tensorboard_gets_numbers_and_grids(tmp_path: Path) -> None:
    from PIL import Image

    board = Board()
    written = metrics(tmp_path, SimpleNamespace(tb_monitor=board))
    written.write(4, loss=0.25, bad=2, skipped="a reason", grad_norm=float("nan"))
    Image.new("L", (6, 4)).save(tmp_path / "grid.png")
    written.show_grid(4, tmp_path / "grid.png")
    written.close()
    assert board.events == [("sr/loss", 0.25, 4), ("sr/bad", 2, 4)]
    assert board.images == [("sr/samples", (4, 6, 3), 4)]


def test_a_full_disk_switches_a_monitor_off(tmp_path: Path) -> None:
    board, csv, lines = Board(), Board(), []

    def full(events: list[tuple]) -> None:
        raise OSError(28, "No space left on device")

    board.write_events = full  # type: ignore[method-assign]
    monitors = Monitors(SimpleNamespace(tb_monitor=board, csv_monitor=csv), "run/sr", lines.append)
    monitors.write({"sr/loss": 1.0}, 1)
    monitors.write({"sr/loss": 2.0}, 2)
    monitors.close()
    assert lines == ["DeepSpeed's tb_monitor is off from now on: [Errno 28] No space left on device"]
    assert len(csv.events) == 2


def test_weights_and_biases_gets_a_run_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through DeepSpeed's own monitor, with a stand-in for the package."""
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.monitor.monitor import MonitorMaster

    calls: list[tuple] = []
    wandb = SimpleNamespace(run=None, Image=lambda path: f"image {Path(path).name}")

    def init(**settings: Any) -> None:
        wandb.run = SimpleNamespace(name="random-words-1")
        calls.append(("init", settings["project"]))

    def finish() -> None:
        calls.append(("finish", wandb.run.name))
        wandb.run = None

    wandb.init, wandb.finish = init, finish
    wandb.define_metric = lambda name, step_metric: calls.append(("define_metric", name, step_metric))
    wandb.log = lambda values, **options: calls.append(("log", values, options))
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/grid.png").touch()
    for stage in ("base", "sr"):
        master = MonitorMaster(DeepSpeedMonitorConfig(wandb={"enabled": True, "project": "images"}))
        written = Metrics(tmp_path / "run", stage=stage, steps=10, start=0, rank=0, monitor=master)
        written.write(1, loss=0.5)
        written.show_grid(1, tmp_path / "run/grid.png")
        written.close()
    assert calls[:5] == [
        ("init", "images"),
        ("define_metric", "*", "step"),
        ("log", {"base/loss": 0.5, "step": 1}, {}),
        ("log", {"base/samples": "image grid.png", "step": 1}, {}),
        ("finish", "run/base"),
    ]
    assert calls[-1] == ("finish", "run/sr")


# ---- profiler


def test_the_profiler_traces_steps_after_the_warm_up(tmp_path: Path) -> None:
    lines: list[str] = []
    profiler = StepProfiler(tmp_path, "base", 2, lines.append)
    for step in range(11, 11 + WARM_UP + 3):
        torch.ones(3).sum()
        profiler.step(step)
    profiler.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"base-step-{11 + WARM_UP:08d}.json.gz"
    assert lines == [f"base: trace of 2 steps in {path}; open it in ui.perfetto.dev"]
    shutil.rmtree(tmp_path / "profile")
    short = StepProfiler(tmp_path, "base", 2, lines.append)
    short.step(1)
    short.close()
    assert lines[1:] == [f"base: no trace, because it begins after {WARM_UP} steps"]
