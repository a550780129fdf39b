"""Power and SM clock of a GPU while each arm's steps run.

nvidia-smi samples in a process of its own, so that it takes no time of the engine's, and says when
it took each sample; those count that fall into an arm's turns.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import fmean
from tempfile import NamedTemporaryFile

import torch

from nanovllm.bench import BenchError
from nanovllm.bench.report import Record
from nanovllm.bench.turns import Turn

SAMPLE_MS = 50
QUERY = "timestamp,power.draw.instant,clocks.sm"
TIME_FORMAT = "%Y/%m/%d %H:%M:%S.%f"
# Samples reach the file in blocks of some kilobytes.
PATIENCE_SECONDS = 6.0


def check_power(device: torch.device) -> None:
    """Raises BenchError if nothing can be sampled."""
    if device.type != "cuda":
        raise BenchError(f"--power needs a CUDA GPU, not {device}")
    if shutil.which("nvidia-smi") is None:
        raise BenchError("--power needs nvidia-smi, which is not on the PATH")


@contextmanager
def sampling(device: torch.device) -> Iterator[Path]:
    """Samples as long as the block runs, into a file."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits",
               f"--id=GPU-{uuid}", f"--loop-ms={SAMPLE_MS}"]  # fmt: skip
    with NamedTemporaryFile() as file, subprocess.Popen(command, stdout=file) as process:
        try:
            yield Path(file.name)
        finally:
            process.terminate()


def read_samples(file: Path, turns: Sequence[Turn]) -> dict[str, Record]:
    """Mean watts and MHz and the number of samples, by label, of arms that were met by any."""
    time.sleep(PATIENCE_SECONDS)
    lines = file.read_text(encoding="utf-8").splitlines()
    samples = [sample for line in lines if (sample := parse(line)) is not None]
    met: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for turn in turns:
        begin = turn.end - sum(turn.seconds)
        met[turn.arm.label] += [s for s in samples if begin <= s[0] <= turn.end]
    readings = {}
    for label, of in met.items():
        if of:
            _, watts, mhz = map(fmean, zip(*of, strict=True))
            readings[label] = {"watts": watts, "sm_mhz": mhz, "samples": len(of)}
    return readings


def parse(line: str) -> tuple[float, float, float] | None:
    """Seconds as `time.time` counts them, watts and MHz; None where a value is not available."""
    try:
        moment, watts, mhz = line.split(",")
        taken = datetime.strptime(moment.strip(), TIME_FORMAT)
        return taken.timestamp(), float(watts), float(mhz)
    except ValueError:
        return None
