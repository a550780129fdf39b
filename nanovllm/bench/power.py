"""Power and SM clock of a GPU while each arm's steps run.

    with PowerLog(device) as log:
        for times in measure(engine, arms, workload, seconds, log.watch): ...
        log.readings()  # by label

nvidia-smi samples in a process of its own, so that it takes no time of the engine's, and says when
it took each sample; those count that fall into an arm's turns.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from statistics import fmean
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from nanovllm.bench import BenchError

SAMPLE_MS = 50
QUERY = "timestamp,power.draw.instant,clocks.sm"
TIME_FORMAT = "%Y/%m/%d %H:%M:%S.%f"
# Samples reach the file in blocks of some kilobytes.
PATIENCE_SECONDS = 6.0

# Seconds as `time.time` counts them, watts, MHz.
Sample = tuple[float, float, float]


def check_power(device: torch.device) -> None:
    """Raises BenchError if nothing can be sampled."""
    if device.type != "cuda":
        raise BenchError(f"--power needs a CUDA GPU, not {device}")
    if shutil.which("nvidia-smi") is None:
        raise BenchError("--power needs nvidia-smi, which is not on the PATH")


class PowerLog:
    """Samples as long as its `with` block runs."""

    def __init__(self, device: torch.device) -> None:
        uuid = torch.cuda.get_device_properties(device).uuid
        self.command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits",
                        f"--id=GPU-{uuid}", f"--loop-ms={SAMPLE_MS}"]  # fmt: skip
        self.turns: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def __enter__(self) -> PowerLog:
        self.file = NamedTemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(self.command, stdout=self.file)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.file.close()

    def watch(self, turns: Iterable[tuple[str, list[float]]]) -> Iterator[tuple[str, list[float]]]:
        """The turns, each noted with the time that its steps took."""
        for label, seconds in turns:
            end = time.time()
            self.turns[label].append((end - sum(seconds), end))
            yield label, seconds

    def readings(self) -> dict[str, dict[str, Any]]:
        """Mean watts and MHz and the number of samples, by label, of arms that were met by any."""
        last = max((end for turns in self.turns.values() for _, end in turns), default=0.0)
        deadline = time.monotonic() + PATIENCE_SECONDS
        samples = self._samples()
        while time.monotonic() < deadline and not (samples and samples[-1][0] > last):
            time.sleep(SAMPLE_MS * 1e-3)
            samples = self._samples()
        readings = {}
        for label, turns in self.turns.items():
            within = [s for s in samples if any(begin <= s[0] <= end for begin, end in turns)]
            if within:
                _, watts, mhz = (fmean(values) for values in zip(*within, strict=True))
                readings[label] = {"watts": watts, "sm_mhz": mhz, "samples": len(within)}
        return readings

    def _samples(self) -> list[Sample]:
        with open(self.file.name, encoding="utf-8") as file:
            return [sample for line in file if (sample := parse(line)) is not None]


def parse(line: str) -> Sample | None:
    """A line of nvidia-smi; None where it is none, or a value is not available."""
    try:
        moment, watts, mhz = line.split(",")
        taken = datetime.strptime(moment.strip(), TIME_FORMAT)
        return taken.timestamp(), float(watts), float(mhz)
    except ValueError:
        return None
