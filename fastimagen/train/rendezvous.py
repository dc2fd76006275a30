"""How the processes of a run find each other: the launcher's environment variables, the store, network interfaces."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

from ..files import first_line
from .peers import Member, Peers

ARRIVAL_POLL = 0.1  # seconds between two looks whether all processes are there
SILENCE = 10.0  # seconds of waiting after which a process says what it waits for


def set_launcher_defaults() -> None:
    """Set the variables of a launcher that are missing to those of one process.

    One process alone takes any free port: that of its launcher may be in use by another run on this host. Raises
    ValueError if several processes have no port in common.
    """
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        if not _agent_has_store():
            os.environ["MASTER_PORT"] = "0"
    elif os.environ["MASTER_PORT"] == "0":
        raise ValueError("MASTER_PORT 0 means any free port, which several processes cannot guess alike: name one")


def meet(timeout: float, *, backend: str) -> Peers | None:
    """Wait until all processes of the launcher have reached the store of rank 0; None if there is only this one.

    timeout: seconds. backend: "nccl" or "gloo". Raises ConnectionError or ValueError, one line with address, port and
    variables, on every process that waits.
    """
    set_launcher_defaults()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return None
    check_interfaces(backend)
    deadline = time.monotonic() + timeout
    me = Member.this(rank)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _open_store(me, deadline, timeout)
    try:
        store.set(f"member/{rank}", json.dumps(me))
        arrived, told = store.add("arrived", 1), False
        while arrived < world_size:
            if time.monotonic() > deadline:
                missing = [number for number in range(world_size) if not store.check([f"member/{number}"])]
                raise ConnectionError(_absent(me, address, timeout, missing, world_size))
            if not told and time.monotonic() > deadline - timeout + SILENCE and _speaks():
                told = True
                print(f"{me}: {arrived} of {world_size} processes have reached {address}; waiting", flush=True)
            time.sleep(ARRIVAL_POLL)
            arrived = store.add("arrived", 0)
        members = [
            Member(*json.loads(member)) for member in store.multi_get([f"member/{r}" for r in range(world_size)])
        ]
        peers = Peers(store, rank, members, address)
    except RuntimeError as error:  # torch's DistError
        raise ConnectionError(
            f"{me}: lost the connection to rank 0 at {address} while waiting for the other processes: "
            f"rank 0 has ended, or the network is down ({first_line(error)})"
        ) from None
    if backend == "gloo" and len({member.host for member in members}) > 1:
        _choose_gloo_interface()
    return peers


def failed_to_connect(peers: Peers, backend: str, error: BaseException) -> ConnectionError:
    """The error, in one line, for processes that have met but whose process group cannot be built."""
    variable = VARIABLES[backend]
    hosts, value = sorted({member.host for member in peers.members}), os.environ.get(variable) or "not set"
    return ConnectionError(
        f"{peers.me}: the processes met at {peers.address} but cannot connect to each other by {backend} "
        f"({first_line(error)}). Hosts: {', '.join(hosts)}. Here {variable} is {value}; "
        f"set it on every host to the interface that the other hosts reach (here: {', '.join(interfaces())}), "
        f"and open all ports between the hosts"
    )


# ---- the store


def _open_store(me: Member, deadline: float, timeout: float) -> Any:
    """A client of the run's store, and the store itself on rank 0 unless torchrun's agent has it."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = me.rank == 0 and not _agent_has_store()
    if not serves:
        _wait_for_port(me, host, port, deadline, timeout)
    try:
        store = TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=True,  # the process group shares the server
        )
    except RuntimeError as error:
        what = "cannot listen" if serves else "cannot reach rank 0"
        raise ConnectionError(
            f"{me}: {what} at MASTER_ADDR:MASTER_PORT = {host}:{port} ({first_line(error)}). "
            f"Choose a free port, the same on all hosts: --master_port of deepspeed, --master-port of torchrun"
        ) from None
    # torchrun's agent keeps its store when it restarts the processes.
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return PrefixStore(f"fastimagen/{attempt}", store)


def _agent_has_store() -> bool:
    """Whether torchrun's agent serves the store, at the port that it names."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _wait_for_port(me: Member, host: str, port: int, deadline: float, timeout: float) -> None:
    """Wait until rank 0 listens. With torch's client the wait would fill the log with its retries."""
    told, began = False, time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            reason = error.strerror or first_line(error)
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"{me}: no connection to rank 0 at MASTER_ADDR:MASTER_PORT = {host}:{port} within {timeout:.0f} s "
                f"({reason}). Check that the first host has been started, that this host reaches that address, and "
                f"that a firewall does not close the port"
            )
        if not told and time.monotonic() > began + SILENCE and _speaks():
            told = True
            print(f"{me}: waiting for rank 0 at {host}:{port} ({reason})", flush=True)
        time.sleep(0.2)


def _absent(me: Member, address: str, timeout: float, missing: list[int], world_size: int) -> str:
    """The error of a process that has waited for others in vain."""
    ranks = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return (
        f"{me}: {world_size - len(missing)} of {world_size} processes reached MASTER_ADDR:MASTER_PORT = {address} "
        f"within {timeout:.0f} s; missing: rank {ranks}. Check that every host has been started with the same "
        f"addresses and number of processes. To wait longer, raise fastimagen.train.timeouts.rendezvous"
    )


def _speaks() -> bool:
    """One process of each host reports progress."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


# ---- network interfaces

VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def interfaces() -> list[str]:
    """The network interfaces of this host, the loopback interface last."""
    names = [name for _, name in socket.if_nameindex()]
    return sorted(names, key=lambda name: name == "lo")


def check_interfaces(backend: str) -> None:
    """Raise ValueError if the backend's variable matches no network interface of this host.

    gloo takes names, NCCL prefixes: "=eth0" is exact, and "^docker" excludes.
    """
    variable = VARIABLES[backend]
    value = os.environ.get(variable, "")
    if not value:
        return
    existing = interfaces()
    if backend == "gloo":
        wrong = [name for name in value.split(",") if name not in existing]
    elif value.startswith("^"):
        excluded = tuple(value[1:].removeprefix("=").split(","))
        wrong = [] if any(not name.startswith(excluded) for name in existing) else [value]
    elif value.startswith("="):
        wrong = [] if set(value[1:].split(",")) & set(existing) else [value]
    else:
        wrong = [] if any(name.startswith(tuple(value.split(","))) for name in existing) else [value]
    if wrong:
        raise ValueError(
            f"{variable}={value} on {socket.gethostname()}: no network interface {', '.join(wrong)}; "
            f"there are {', '.join(existing)}. Set it to the one that the other hosts reach"
        )


def _choose_gloo_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the interface towards MASTER_ADDR.

    By itself gloo takes the address of the host's name, which is often 127.0.1.1. Raises ValueError if that interface
    is the loopback interface.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = interface_towards(host, port)
    if name in (None, "lo"):
        raise ValueError(
            f"MASTER_ADDR={host} does not lead to a network interface of {socket.gethostname()} that other hosts "
            f"reach: give rank 0's IP address, or set GLOO_SOCKET_IFNAME to one of {', '.join(interfaces())}"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = name
    if _speaks():
        print(f"GLOO_SOCKET_IFNAME: {name} on {socket.gethostname()}, the interface towards {host}", flush=True)


def interface_towards(host: str, port: int) -> str | None:
    """The name of the network interface with the address from which this host would reach `host`."""
    import psutil

    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses the route; sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            return name
    return None
