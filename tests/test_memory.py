"""The peak is that of the time that is looked at, and None where nobody knows it."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from lorasculpt import memory, provenance
from lorasculpt.memory import Peak

CPU = torch.device("cpu")
MEGABYTE = 2**20


def test_a_machine_is_its_processor_and_threads_or_its_gpu(monkeypatch):
    name, threads = provenance.machine(CPU).rsplit(", ", 1)
    assert name
    assert threads == f"{torch.get_num_threads()} threads"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert provenance.machine(torch.device("cuda", 0)) == "a GPU"
    assert provenance.machine(torch.device("mps")) == f"{name}, mps"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is no peak to be set back")
def test_it_is_the_peak_since_it_was_asked_for_and_not_of_what_was_before():
    if not memory._reset():
        pytest.skip("this system does not let a process set its peak back")
    before = torch.ones(100 * MEGABYTE)  # 400 MB
    del before
    peak = Peak(CPU)
    assert peak.of == "process"
    start = peak.bytes()
    held = torch.ones(50 * MEGABYTE)
    held += 1
    del held
    grown = peak.bytes()
    assert 150 * MEGABYTE < grown - start < 300 * MEGABYTE
    assert peak.bytes() == grown  # it does not sink with what is in use
    assert Peak(CPU).bytes() < grown - 100 * MEGABYTE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is no peak to be set back")
def test_what_was_freed_before_does_not_count():
    if not memory._reset() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this system does not let a process set its peak back, or its C library gives nothing back")
    start = Peak(CPU).bytes()
    blocks = [torch.ones(10_000) for _ in range(5000)]  # 200 MB in blocks that malloc keeps
    last = torch.ones(10)  # above all of them
    del blocks
    assert Peak(CPU).bytes() - start < 50 * MEGABYTE
    assert last.sum() == 10


@pytest.mark.parametrize(("lives", "expected"), [((500, 700), 700), ((500, 500), None), ((None, None), None)])
def test_the_peak_of_a_whole_life_counts_where_it_was_reached_now(monkeypatch, lives, expected):
    told = iter(lives)
    monkeypatch.setattr(memory, "_reset", lambda: False)
    monkeypatch.setattr(memory, "_of_life", lambda: next(told))
    assert Peak(CPU).bytes() == expected


def test_a_system_that_refuses_to_count_anew_is_told(tmp_path):
    assert not memory._reset(tmp_path / "none" / "clear_refs")


def test_units_of_the_systems(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    for system, expected in (("linux", 3072), ("darwin", 3)):
        monkeypatch.setattr(memory.sys, "platform", system)
        assert memory._of_life() == expected


def test_of_a_gpu_it_is_what_its_tensors_took(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if calls == [device] else 0)
    peak = Peak(torch.device("cuda", 1))
    assert (peak.of, peak.bytes()) == ("cuda", 7)


def test_of_another_device_nothing_is_known():
    assert Peak(torch.device("meta")).bytes() is None


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (lambda: torch.empty(10**15), "out of memory, for 4000000000000000 bytes more"),
        (lambda: bytearray(10**18), "out of memory"),
    ],
)
def test_out_of_memory_is_known_by_what_says_so(fails, told):
    with pytest.raises((RuntimeError, MemoryError)) as found:
        fails()
    assert memory.ran_out(found.value) == told


def test_out_of_memory_on_a_gpu_says_how_much_was_wanted():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14 GiB"
    )
    assert memory.ran_out(error) == "out of memory, for 2.00 GiB more"
    assert memory.ran_out(RuntimeError("size mismatch")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_that_others_may_have_is_told_as_such(error):
    assert memory.ran_out(error) == "out of memory on the GPU, which another process may be using as well"
