"""Power and SM clock of a GPU while each arm's steps run.

    with PowerLog(command_for(device)) as log:
        times = gather(log.watch(run_turns(engine, arms, workload, rounds)))
    log.readings()  # by label

nvidia-smi samples in a process of its own, so that it takes no time of the engine's. It says when
each sample was taken; those count that fall into an arm's turns.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

import torch

from nanovllm.bench import BenchError
from nanovllm.bench.compare import Turn

SAMPLE_MS = 50
QUERY = "timestamp,power.draw.instant,clocks.sm"
TIME_FORMAT = "%Y/%m/%d %H:%M:%S.%f"
# Samples may reach us in blocks of some kilobytes.
PATIENCE_SECONDS = 6.0


@dataclass(frozen=True)
class Sample:
    """Watts and MHz at a moment, in seconds as `time.time` counts them."""

    moment: float
    watts: float
    sm_mhz: float


@dataclass(frozen=True)
class Reading:
    """Means over an arm's turns, and of how many samples."""

    watts: float
    sm_mhz: float
    samples: int


def command_for(device: torch.device) -> list[str]:
    """The command that prints one sample of a CUDA device.

    Raises:
        BenchError: it is no CUDA device, or there is no nvidia-smi.
    """
    if device.type != "cuda":
        raise BenchError(f"--power needs a CUDA GPU, not {device}")
    program = shutil.which("nvidia-smi")
    if program is None:
        raise BenchError("--power needs nvidia-smi, which is not on the PATH")
    uuid = torch.cuda.get_device_properties(device).uuid
    return [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]


class PowerLog(AbstractContextManager["PowerLog"]):
    """Samples from when it is made until it is closed.

    Args:
        command: prints one sample, and with `--loop-ms=N` one every N ms; see `command_for`.

    Raises:
        BenchError: the command fails.
    """

    def __init__(self, command: Sequence[str]) -> None:
        first = subprocess.run(command, capture_output=True, text=True, check=False)
        if first.returncode or parse(first.stdout) is None:
            said = (first.stdout or first.stderr).strip()
            raise BenchError(f"--power: {' '.join(command)} said {said!r}")
        self.samples: list[Sample] = []
        self.turns: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._process = subprocess.Popen(
            [*command, f"--loop-ms={SAMPLE_MS}"], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def watch(self, turns: Iterable[Turn]) -> Iterator[Turn]:
        """The turns, each noted with the time that its steps took."""
        for label, seconds in turns:
            end = time.time()
            self.turns[label].append((end - sum(seconds), end))
            yield label, seconds

    def readings(self) -> dict[str, Reading]:
        """By label, of those arms in whose turns a sample was taken; call it before closing."""
        last = max((end for turns in self.turns.values() for _, end in turns), default=0.0)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            samples = list(self.samples)
            if samples and samples[-1].moment > last:
                break
            time.sleep(SAMPLE_MS * 1e-3)
        readings = {}
        for label, turns in self.turns.items():
            within = [s for s in samples if any(a <= s.moment <= b for a, b in turns)]
            if within:
                watts, mhz = fmean(s.watts for s in within), fmean(s.sm_mhz for s in within)
                readings[label] = Reading(watts, mhz, len(within))
        return readings

    def close(self) -> None:
        """Ends sampling; may be called twice."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if (sample := parse(line)) is not None:
                    self.samples.append(sample)


def parse(line: str) -> Sample | None:
    """A line of nvidia-smi; None where it is none, or a value is not available."""
    try:
        moment, watts, mhz = line.split(",")
        taken = datetime.strptime(moment.strip(), TIME_FORMAT)
        return Sample(taken.timestamp(), float(watts), float(mhz))
    except ValueError:
        return None
