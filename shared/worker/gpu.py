"""The GPUs of a worker, by NVML (nvidia-ml-py, optional): use, memory, power and temperature, read when asked.

Invariant: without the library, a driver or a GPU there is nothing, and no error; a figure that a GPU does not give is
left out.
"""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
FIGURES: tuple[tuple[str, str, Callable[[Any, Any], float]], ...] = (
    (
        "baton_gpu_utilization_ratio",
        "Share of the last moment in which the GPU computed",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    ("baton_gpu_memory_used_bytes", "Of all processes", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
    ("baton_gpu_memory_bytes", "That there is", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
    ("baton_gpu_power_watts", "Drawn now", lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
    (
        "baton_gpu_temperature_celsius",
        "Of the chip",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
)


def watch_gpus(registry: CollectorRegistry) -> None:
    """Those that this process may use."""
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        gpus = GpuMetrics(pynvml, os.environ.get(VISIBLE))
    except pynvml.NVMLError as error:
        log.debug("no GPU figures: %s", error)
        return
    if gpus.count:
        registry.register(gpus)


class GpuMetrics(Collector):
    def __init__(self, nvml: Any, visible: str | None) -> None:
        """`nvml`: the library, started. `visible`: numbers or ids by commas; None: all."""
        self._nvml = nvml
        self._gpus: dict[str, Any] = {}
        if visible is None:
            names = [str(number) for number in range(nvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip()]
        for name in names:
            if name.isdigit():
                self._gpus[name] = nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                self._gpus[name] = nvml.nvmlDeviceGetHandleByUUID(name)

    @property
    def count(self) -> int:
        return len(self._gpus)

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(name, text, labels=["gpu"]) for name, text, _ in FIGURES]

    def collect(self) -> Iterable[Metric]:
        for name, text, read in FIGURES:
            family = GaugeMetricFamily(name, text, labels=["gpu"])
            for gpu, handle in self._gpus.items():
                try:
                    family.add_metric([gpu], float(read(self._nvml, handle)))
                except self._nvml.NVMLError as error:
                    log.debug("%s of GPU %s: %s", name, gpu, error)
            yield family
