"""The kernels that are compiled ahead of a measurement are those that it launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_groups
from benchmarks.cases.host_time import _on_cpu_tensors
from benchmarks.harness import networks
from benchmarks.harness.kernel_cache import compilations_of, compile_all, listing
from benchmarks.harness.offline import TARGETS
from fastimagen import ops
from fastimagen.ops import dispatch

SM_90 = TARGETS["sm_90"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def backend_as_before():
    before = ops.backend()
    yield
    ops.set_backend(before)


@pytest.mark.parametrize("network", [networks.TOY, networks.TOY_SUPER], ids=lambda network: network.name)
def test_a_step_on_meta_tensors_lists_what_real_tensors_launch(network: networks.Network) -> None:
    """Real addresses and strides of a bf16 step; launches are noted with Triton's own key, not made."""
    listed = compilations_of([lambda: gpu_groups._train(network, 2)], SM_90)
    config = network.stage().config.unet
    unet = networks.make_unet(config, CPU, torch.bfloat16)
    x, time = networks.images(2, network.side, CPU).bfloat16(), torch.tensor([3.0, 21.0])
    lowres = {"lowres": x, "lowres_time": time} if config.lowres else {}
    text = networks.captions(2, config.text_dim, CPU).to(dtype=torch.bfloat16)
    with _on_cpu_tensors(dispatch), listing(SM_90) as launched:
        ops.set_backend("triton")
        unet(x, time, text=text, keep_text=torch.tensor([True, False]), **lowres).float().square().mean().backward()
    names = [{one.name for one in found.values()} for found in (listed, launched)]
    assert names[0] == names[1] and len(names[0]) > 5
    assert launched.keys() <= listed.keys()


def test_every_group_of_ours_has_kernels() -> None:
    for group in gpu_groups.GROUPS:
        calls = list(gpu_groups.launches(group, toys=True))
        assert bool(calls) == (group != "compilers"), group


def test_kernels_are_compiled_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By processes that share the cache; and one that does not compile is named, not raised."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = list(compilations_of(list(gpu_groups.launches("group_norm", toys=True))[:1], SM_90).values())[:2]
    broken = found[0]._replace(options={**found[0].options, "num_warps": 3})
    first = compile_all([*found, broken], SM_90, 2)
    assert [one.was_cached for one in first] == [False, False, False]
    assert [one.error is None for one in first] == [True, True, False]
    assert all(one.was_cached for one in compile_all(found, SM_90, 2))
