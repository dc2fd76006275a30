"""Two hosts, as network namespaces with process numbers and names of their own: cut the link between them, stop or kill
a process, and resume. Needs root, iproute2 and util-linux:

    python -m tests.drills.two_hosts --out tests/drills/results/two_hosts.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, toy_tree

HEARTBEAT = 10.0
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node-a", "node-b")


def network(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def set_up() -> None:
    for name in NAMES:
        network(f"netns add {name}")
        network(f"-n {name} link set lo up")
    network("link add veth-a netns node-a type veth peer name veth-b netns node-b")
    for name, address, device in zip(NAMES, ADDRESSES, ("veth-a", "veth-b")):
        network(f"-n {name} address add {address}/24 dev {device}")
        network(f"-n {name} link set {device} up")


def tear_down() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


class Host:
    """Training on one of the two hosts, with one process."""

    def __init__(self, rank: int, config: Path, run: Path, **variables: str) -> None:
        self.log = run.parent / f"{NAMES[rank]}.log"
        training = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(config), "--run-dir", str(run)]
        command = ["ip", "netns", "exec", NAMES[rank], "unshare", "--uts", "--pid", "--fork", "--mount-proc"]
        command += ["sh", "-c", f'hostname {NAMES[rank]}; exec "$@"', "sh", *training, "--stage", "base"]
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29400",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the training process, the child of `unshare`."""
        import psutil

        (training,) = psutil.Process(self.process.pid).children()
        training.send_signal(number)

    def first_error(self) -> str:
        lines = self.log.read_text().splitlines()
        return next((line for line in lines if line.startswith("error:") or "rerun the command" in line), "")


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def wait_for_step(run: Path, step: int, hosts: list[Host]) -> None:
    until = time.monotonic() + 180
    while max(losses(run), default=0) < step:
        assert all(host.process.poll() is None for host in hosts), "\n".join(host.log.read_text() for host in hosts)
        assert time.monotonic() < until, "training does not get there"
        time.sleep(0.2)


def ended(hosts: list[Host], since: float, stopped: int | None = None) -> list[dict[str, Any]]:
    """What each host's process reported, and after how many seconds; None where it had to be killed.

    A stopped process cannot end. It is continued when the others have ended; its seconds count from there."""
    results: list[dict[str, Any]] = [{} for _ in hosts]
    while not all(results) and time.monotonic() < since + 90:
        if stopped is not None and all(results[rank] for rank in range(len(hosts)) if rank != stopped):
            hosts[stopped].send(signal.SIGCONT)
            stopped, since = None, time.monotonic()
        for result, host in zip(results, hosts):
            if not result and host.process.poll() is not None:
                seconds = round(time.monotonic() - since, 1)
                result |= {"seconds": seconds, "status": host.process.returncode, "error": host.first_error()}
        time.sleep(0.1)
    for result, host in zip(results, hosts):
        if not result:
            host.send(signal.SIGKILL)
            host.process.wait()
            result |= {"seconds": None, "status": "killed after 90 s", "error": host.first_error()}
        text = host.log.read_text()
        result["raw lines of gloo"] = len(re.findall(r"^.*(?:gloo/transport|frame #\d).*$", text, flags=re.MULTILINE))
    return results


def scenario(name: str, folder: Path, config: Path, disturb, stopped: int | None = None) -> dict[str, Any]:
    """Train, disturb, wait for the end, resume to the end, and compare the losses with an undisturbed run's."""
    run = folder / name.replace(" ", "_") / "run"
    run.parent.mkdir()
    hosts = [Host(rank, config, run) for rank in (0, 1)]
    wait_for_step(run, 5, hosts)
    began = time.monotonic()
    disturb(hosts)
    result: dict[str, Any] = {"disturbance": name, "hosts": dict(zip(NAMES, ended(hosts, began, stopped)))}
    network("-n node-a link set veth-a up")
    hosts = [Host(rank, config, run) for rank in (0, 1)]
    result["resumed"] = [host.process.wait(timeout=300) for host in hosts]
    result["losses"] = losses(run)
    return result


def unreachable(folder: Path, config: Path) -> dict[str, Any]:
    """Rank 1 alone, and rank 0 alone: what each says after the time-out of the rendezvous; and a misspelt interface."""
    found = {}
    for rank in (0, 1):
        run = folder / f"alone{rank}" / "run"
        run.parent.mkdir()
        began = time.monotonic()
        found[f"{NAMES[rank]} alone"] = ended([Host(rank, config, run)], began)[0]
    run = folder / "interface" / "run"
    run.parent.mkdir()
    began = time.monotonic()
    found["GLOO_SOCKET_IFNAME=eth7"] = ended([Host(0, config, run, GLOO_SOCKET_IFNAME="eth7")], began)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    options = parser.parse_args()
    from fastimagen.config import FastimagenConfig
    from fastimagen.data.embedding import embed_all
    from fastimagen.data.prepare import prepare_shapes

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tree = toy_tree(folder / "shapes")
        prepare_shapes(FastimagenConfig.model_validate(tree["fastimagen"]), say=print)
        embed_all(FastimagenConfig.model_validate(tree["fastimagen"]), say=print)
        rarely = {"validate_every": 1000, "sample_every": 1000}
        timeouts = {"heartbeat": HEARTBEAT, "rendezvous": 90}
        tree["fastimagen"]["train"] |= {"steps": 16, "checkpoint_every": 4, "timeouts": timeouts, **rarely}
        config, short = folder / "ds.json", folder / "short.json"
        config.write_text(json.dumps(tree))
        timeouts["rendezvous"] = 12
        short.write_text(json.dumps(tree))
        try:
            set_up()
            plain = folder / "undisturbed" / "run"
            plain.parent.mkdir()
            hosts = [Host(rank, config, plain) for rank in (0, 1)]
            assert [host.process.wait(timeout=300) for host in hosts] == [0, 0], hosts[0].log.read_text()
            results = [
                scenario("link cut", folder, config, lambda hosts: network("-n node-a link set veth-a down")),
                scenario("rank 1 stopped", folder, config, lambda hosts: hosts[1].send(signal.SIGSTOP), 1),
                scenario("rank 0 stopped", folder, config, lambda hosts: hosts[0].send(signal.SIGSTOP), 0),
                scenario("rank 1 killed", folder, config, lambda hosts: hosts[1].send(signal.SIGKILL)),
                scenario("SIGTERM to rank 1", folder, config, lambda hosts: hosts[1].send(signal.SIGTERM)),
            ]
            rendezvous = unreachable(folder, short)
        finally:
            tear_down()
        for result in results:
            result["same losses as undisturbed"] = result.pop("losses") == losses(plain)
        import torch

        report = {
            "heartbeat_s": HEARTBEAT,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "scenarios": results,
            "rendezvous": rendezvous,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
