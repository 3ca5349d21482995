"""Figures of GPUs, from a stand-in for NVML: the real one needs a driver."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from shared.worker.gpu import GpuMetrics


class NotSupportedError(Exception):
    pass


class Nvml:
    NVMLError = NotSupportedError
    NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number):  # noqa: N802
        return number

    def nvmlDeviceGetHandleByUUID(self, name):  # noqa: N802
        return {"GPU-a": 1}[name]

    def nvmlDeviceGetUtilizationRates(self, gpu):  # noqa: N802
        return SimpleNamespace(gpu=40 + gpu)

    def nvmlDeviceGetMemoryInfo(self, gpu):  # noqa: N802
        return SimpleNamespace(used=10 + gpu, total=100)

    def nvmlDeviceGetPowerUsage(self, gpu):  # noqa: N802
        raise NotSupportedError("no sensor")

    def nvmlDeviceGetTemperature(self, gpu, sensor):  # noqa: N802
        return 55


def test_every_gpu_has_its_figures_and_a_missing_sensor_is_left_out():
    registry = CollectorRegistry()
    registry.register(GpuMetrics(Nvml(), None))
    read = registry.get_sample_value
    assert [read("baton_gpu_utilization_ratio", {"gpu": gpu}) for gpu in ("0", "1")] == [0.4, 0.41]
    assert read("baton_gpu_memory_used_bytes", {"gpu": "1"}) == 11
    assert read("baton_gpu_temperature_celsius", {"gpu": "0"}) == 55
    assert read("baton_gpu_power_watts", {"gpu": "0"}) is None


def test_a_worker_shows_only_the_gpus_it_may_use():
    assert GpuMetrics(Nvml(), "1").count == 1
    assert GpuMetrics(Nvml(), "GPU-a, 0").count == 2
    assert GpuMetrics(Nvml(), "").count == 0
