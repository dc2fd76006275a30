"""The watchdog: who is at fault, in unit tests with several ranks in one process; a stopped rank in a real run."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from fastimagen.config import TimeoutConfig
from fastimagen.train import rendezvous
from fastimagen.train.exit_status import EXIT_LOST
from fastimagen.train.peers import Failure, Member, Peers, Status
from fastimagen.train.phases import Phases
from fastimagen.train.preemption import StopRequest
from fastimagen.train.watchdog import Watchdog, is_of_collectives
from tests.forked import ForkedProcess

FIVE = [Member(rank, f"node-{rank // 2}", 100 + rank, 0.0, f"machine {rank // 2}") for rank in range(5)]


def watchdog(rank: int = 0, **timeouts: float) -> Watchdog:
    """The watchdog of one of FIVE, not running."""
    store = dist.HashStore()
    if rank:
        Peers(store, 0, FIVE, "node-0:29500")
    peers, phases = Peers(store, rank, FIVE, "node-0:29500"), Phases()
    return Watchdog(peers, phases, TimeoutConfig(**timeouts), StopRequest(None, phases))


def statuses(*entered: int, seconds: float = 1.0) -> dict[int, Status]:
    return {
        rank: Status(7, count, "backward", f"backward of base step {count}", seconds, limit=60.0)
        for rank, count in enumerate(entered)
    }


def test_only_the_process_behind_the_others_is_judged_by_its_phase() -> None:
    late = statuses(9, 9, 8, 9, 9, seconds=61.0)
    failure = watchdog()._judge(late, [], dict.fromkeys(range(5), 0.0))
    assert failure is not None and failure.ranks == (2,) and failure.status == EXIT_LOST
    assert failure.text.startswith("rank 2 (process 102 on node-1): backward of base step 8 has lasted 61 s")
    assert "fastimagen.train.timeouts.backward allows (60 s)" in failure.text
    late[2] = late[2]._replace(seconds=59.0)  # the others may wait for it for as long as it may take
    assert watchdog()._judge(late, [], dict.fromkeys(range(5), 0.0)) is None


def test_a_hang_of_all_ranks_is_one_of_all_ranks() -> None:
    failure = watchdog()._judge(statuses(9, 9, 9, 9, 9, seconds=61.0), [], dict.fromkeys(range(5), 0.0))
    assert failure is not None and failure.text.startswith("all 5 ranks: ") and failure.ranks == (0, 1, 2, 3, 4)


def test_silence_is_named_with_the_last_phase_unless_the_process_has_finished() -> None:
    ages = {0: 0.0, 1: 0.0, 2: 21.0, 3: 22.0, 4: 0.0}
    found = statuses(9, 9, 8, 9, 9)
    failure = watchdog()._judge(found, [], ages)
    assert failure is not None and failure.ranks == (2, 3)
    assert "rank 2 (process 102 on node-1), rank 3 (process 103 on node-1) for 21 s" in failure.text
    found[2], found[3] = found[2]._replace(done=True), found[3]._replace(done=True)
    assert watchdog()._judge(found, [], ages) is None


@pytest.mark.parametrize("rank", [0, 3])
def test_a_dead_neighbour_is_noticed_by_any_rank(rank: int) -> None:
    found = statuses(9, 9, 9, 9, 9)
    failure = watchdog(rank)._judge({2: found[2]}, [2], {0: 0.0})
    assert failure is not None and "rank 2 (process 102 on node-1) has ended without a word" in failure.text
    assert watchdog(rank)._judge({2: found[2]._replace(done=True)}, [2], {0: 0.0}) is None


def test_the_first_failure_counts() -> None:
    store = dist.HashStore()
    peers = [Peers(store, rank, FIVE, "") for rank in range(3)]
    first = Failure("rank 1: disk full", (1,), 1)
    assert peers[1].fail(first) == first
    assert peers[2].fail(Failure("rank 2: connection closed", (2,), EXIT_LOST)) == first
    assert peers[0].look([])[2] == first


def test_errors_of_communication_are_told_from_others() -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1234"
    assert is_of_collectives(RuntimeError(gloo)) and is_of_collectives(dist.DistBackendError("NCCL error"))
    assert not is_of_collectives(RuntimeError("CUDA out of memory")) and not is_of_collectives(OSError("gloo"))


# ---- rendezvous


@pytest.mark.parametrize(
    ("backend", "value", "right"),
    [
        ("gloo", "lo", True),
        ("gloo", "lo,eth7", False),
        ("nccl", "lo", True),
        ("nccl", "eth7,l", True),  # prefixes
        ("nccl", "=l", False),
        ("nccl", "=lo", True),
        ("nccl", "^docker", True),
        ("nccl", "eth7", False),
    ],
)
def test_interface_variables_are_checked(
    backend: str, value: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "interfaces", lambda: ["enp3s0", "lo"])
    variable = rendezvous.VARIABLES[backend]
    monkeypatch.setenv(variable, value)
    if right:
        rendezvous.check_interfaces(backend)
    else:
        with pytest.raises(ValueError, match=f"{variable}=.*no network interface .*; there are enp3s0, lo"):
            rendezvous.check_interfaces(backend)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "message"), [(0, r"1 of 2 processes reached .*; missing: rank 1\."), (1, "no connection to rank 0 at .*")]
)
def test_a_failed_rendezvous_names_address_and_ranks(rank: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError, match=f"rank {rank} .*{message}") as refused:
        rendezvous.meet(0.5, backend="gloo")
    assert str(variables["MASTER_PORT"]) in str(refused.value) and "\n" not in str(refused.value)


def test_one_process_does_not_need_the_port_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed` takes port 29500 unless told otherwise: a second run on the same host finds it in use."""
    with socket.create_server(("127.0.0.1", 0)) as other_run:
        port = other_run.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        rendezvous.set_launcher_defaults()
        store, rank, world_size = next(dist.rendezvous("env://"))
        assert (rank, world_size) == (0, 1) and store.port != port


def test_the_interface_towards_an_address_is_found() -> None:
    assert rendezvous.interface_towards("127.0.0.1", 80) == "lo"


# ---- a real run


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_on_every_rank(
    toy_config: dict, write_config: Callable[[dict], Path], tmp_path: Path
) -> None:
    toy_config["fastimagen"]["train"] |= {
        "steps": 5000,
        "checkpoint_every": 5000,
        "validate_every": 5000,
        "sample_every": 5000,
        "timeouts": {"heartbeat": 3.0},
    }
    config, run = write_config(toy_config), tmp_path / "run"
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ["train", "--config", str(config), "--run-dir", str(run), "--stage", "base"]
    processes = [
        ForkedProcess(arguments, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
            assert all(process.poll() is None for process in processes) and time.monotonic() < until
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGSTOP)
        output, _ = processes[0].communicate(timeout=60)
        assert processes[0].returncode == EXIT_LOST, output
        assert processes[1].wait(timeout=30) == -signal.SIGKILL  # by rank 0: a stopped process cannot end by itself
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    host = socket.gethostname()
    assert f"no sign of life from rank 1 (process {processes[1].pid} on {host})" in lines[first]
    assert lines[first + 1].startswith(f"rank 0 (process {processes[0].pid} on {host}), ") and "base step" in output
    assert "stack of the main thread:" in output and "_fit_stage" in output
    assert "Traceback" not in output and "gloo/" not in output
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
