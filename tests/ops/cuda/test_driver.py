"""Kernels are loaded and launched to the byte; a library that plays the driver stands in for a GPU."""

from __future__ import annotations

import ctypes
import threading

import pytest

from vlm.errors import KernelError
from vlm.ops.cuda import driver as cuda_driver
from vlm.ops.cuda import library as cuda_library

LAUNCH = ["cuCtxGetCurrent", "cuLaunchKernel"]


@pytest.fixture
def probe(driver, image):
    return driver.load(image, "vlm_probe", 0)


@pytest.fixture
def on_device_0(fake):
    fake.fake_enter(0)
    yield
    fake.fake_leave()


def calls(fake) -> list[str]:
    return fake.fake_log().decode().splitlines()


def names(fake) -> list[str]:
    return [line.split()[0] for line in calls(fake)]


def argument():
    return cuda_library.ProbeArgument(0x1122334455667788, -2, 0xDEADBEEF, 7)


# launching


def test_a_launch_passes_everything_to_the_byte(fake, probe, on_device_0):
    fake.fake_reset(24)
    probe.launch((11, 12, 13), (32, 2, 3), 4096, argument(), 0xABC)
    assert calls(fake) == [
        "cuCtxGetCurrent",
        "cuLaunchKernel vlm_probe device 0 grid 11 12 13 block 32 2 3 shared 4096 stream 2748 argument "
        f"{bytes(argument()).hex()}",
    ]
    assert bytes(argument()).hex() == "8877665544332211feffffffffffffffefbeadde07000000"


@pytest.mark.parametrize("index", [0, 1])
def test_the_current_stream_of_the_kernels_device_is_used(
    fake, driver, image, on_device_0, monkeypatch, index
):
    monkeypatch.setattr(cuda_driver, "current_stream", lambda index: 500 + index)
    driver.load(image, "vlm_probe", index).launch((1, 1, 1), (1, 1, 1), 0, argument())
    (launched,) = [line for line in calls(fake) if line.startswith("cuLaunchKernel")]
    assert f" device {index} " in launched and f" stream 50{index} " in launched


def test_another_device_is_entered_and_left(fake, driver, image, on_device_0):
    kernel = driver.load(image, "vlm_probe", 1)
    fake.fake_reset(24)
    kernel.launch((1, 1, 1), (1, 1, 1), 0, argument(), 9)
    assert names(fake) == ["cuCtxGetCurrent", "cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    assert fake.fake_depth() == 1


def test_a_thread_that_has_not_used_cuda_can_launch(fake, probe):
    failures = []

    def launch():
        try:
            probe.launch((1, 1, 1), (1, 1, 1), 0, argument(), 9)
        except KernelError as error:
            failures.append(error)

    fake.fake_reset(24)
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert failures == [] and "cuLaunchKernel" in names(fake)


def test_nothing_waits_for_the_gpu(fake, probe, on_device_0):
    for _ in range(3):
        probe.launch((1, 1, 1), (1, 1, 1), 0, argument(), 9)
    assert not [name for name in names(fake) if "Synchronize" in name]
    fake.fake_reset(24)
    probe.launch((1, 1, 1), (1, 1, 1), 0, argument(), 9)
    assert names(fake) == LAUNCH


def test_more_shared_memory_is_asked_for_once(fake, probe, on_device_0):
    fake.fake_reset(24)
    for shared_bytes in (48 * 1024, 70_208, 70_208, 60_000, 100_000):
        probe.launch((1, 1, 1), (1, 1, 1), shared_bytes, argument(), 9)
    asked = [line for line in calls(fake) if line.startswith("cuFuncSetAttribute")]
    assert asked == ["cuFuncSetAttribute 8 70208", "cuFuncSetAttribute 8 100000"]


def test_more_shared_memory_than_there_is_is_an_error(fake, probe, on_device_0):
    with pytest.raises(
        KernelError, match="300000 bytes of shared memory.*has 232448.*CUDA_ERROR_INVALID_VALUE"
    ):
        probe.launch((1, 1, 1), (1, 1, 1), 300_000, argument(), 9)
    probe.launch((1, 1, 1), (1, 1, 1), 50_000, argument(), 9)


def test_threads_do_not_mix_their_arguments(fake, probe):
    fake.fake_reset(24)

    def launch(number):
        for turn in range(200):
            mine = cuda_library.ProbeArgument(number, turn, number, turn)
            probe.launch((number, turn + 1, 1), (1, 1, 1), 0, mine, number)

    threads = [threading.Thread(target=launch, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = [line.split() for line in calls(fake) if line.startswith("cuLaunchKernel")]
    assert len(launches) == 800
    for words in launches:
        number, turn = int(words[5]), int(words[6]) - 1
        expected = bytes(cuda_library.ProbeArgument(number, turn, number, turn)).hex()
        assert words[words.index("argument") + 1] == expected and words[words.index("stream") + 1] == str(
            number
        )


def test_an_argument_of_another_size_is_refused(fake, probe, on_device_0):
    class Short(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p),)

    fake.fake_reset(24)
    with pytest.raises(ValueError, match="vlm_probe takes 24 bytes, got a Short of 8"):
        probe.launch((1, 1, 1), (1, 1, 1), 0, Short(), 9)
    assert calls(fake) == []


def test_an_error_has_cudas_name_and_says_what_was_launched(fake, probe, on_device_0):
    fake.fake_fail(b"cuLaunchKernel", 700)
    message = (
        r"launching vlm_probe on cuda:0 \(grid \(5, 1, 1\).*CUDA_ERROR_ILLEGAL_ADDRESS \(an illegal memory.*"
        "VLM_SCAN_BACKEND=chunked"
    )
    with pytest.raises(KernelError, match=message):
        probe.launch((5, 1, 1), (1, 1, 1), 0, argument(), 9)


def test_an_error_without_a_name_has_its_number(fake, driver):
    with pytest.raises(KernelError, match="CUDA error 4242"):
        driver.check(4242, "trying")


# loading


def test_loading_is_allowed_while_a_stream_is_captured(fake, driver, image):
    fake.fake_reset(24)
    fake.fake_capture(1)
    driver.load(image, "vlm_probe", 0)
    modes = [line for line in calls(fake) if "CaptureMode" in line]
    assert modes == ["cuThreadExchangeStreamCaptureMode 2", "cuThreadExchangeStreamCaptureMode 0"]
    assert "cuFuncLoad" in names(fake)


@pytest.mark.parametrize(
    "call", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad", "cuCtxPushCurrent"]
)
def test_a_module_that_does_not_load_is_an_error(fake, driver, image, call):
    fake.fake_fail(call.encode(), 200)
    with pytest.raises(KernelError, match="CUDA_ERROR_INVALID_IMAGE"):
        driver.load(image, "vlm_probe", 0)


def test_a_kernel_that_is_not_in_the_module_is_an_error(driver, image):
    with pytest.raises(KernelError, match="no kernel vlm_scan"):
        driver.load(image, "vlm_scan", 0)


def test_a_driver_that_does_not_start_is_an_error(fake):
    fake.fake_fail(b"cuInit", 700)
    with pytest.raises(KernelError, match="starting the driver failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda_driver.Driver(fake)
    fake.fake_fail(b"", 0)


def test_a_library_that_is_no_driver_is_refused():
    with pytest.raises(OSError, match="has no cuInit"):
        cuda_driver.Driver(ctypes.CDLL(None))
