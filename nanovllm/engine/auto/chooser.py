"""Mode "auto": several plans for a decode step stand ready, and a planner picks one each time.

They are sequential decode, the split of the SMs that is configured, and some more. Whatever the
planner picks has its graph already. How long a step took on the device goes back to the planner.
"""

from __future__ import annotations

from nanovllm.engine.auto.calibration import Calibration
from nanovllm.engine.auto.cost_table import CostTable
from nanovllm.engine.auto.planner import Planner, Prediction
from nanovllm.engine.plan import GREEN, SEQUENTIAL_NUMBER, Choice, Plan
from nanovllm.engine.step_runner import FixedChooser, StepRunner

# The FFN gets a group of whole multiples of this many SMs, about these shares of all of them.
FFN_MULTIPLE = 8
FFN_SHARES = (0.79, 0.72, 0.67, 0.61, 0.55)
Split = tuple[int, int]


class AutoChooser(FixedChooser):
    """Lets a planner choose among the plans of `runner` by what `calibration` measures of them."""

    def __init__(self, runner: StepRunner, calibration: Calibration) -> None:
        super().__init__(runner.schedulers, runner.memory)
        self.plans = [scheduler.plan for scheduler in runner.schedulers]
        self.sizes = [] if runner.memory is None else runner.memory.sizes
        self.calibration = calibration
        self.planner = Planner(CostTable(), self.plans[:1], [self.sizes])
        runner.statistics.planner = self.planner

    def choose(self, num_seqs: int, tokens: int) -> Choice:
        return self.planner.choose(num_seqs, tokens)

    def observe(self, prediction: Prediction, seconds: float) -> None:
        self.planner.observe(prediction, seconds)

    def capture(self, runner: StepRunner, *, show_progress: bool) -> None:
        """Captures sequential decode, then prepares the choice."""
        sequential = [Choice(SEQUENTIAL_NUMBER, size) for size in self.sizes]
        runner.capture(sequential, show_progress=show_progress)
        self.calibrate(runner, show_progress=show_progress)

    def calibrate(self, runner: StepRunner, *, show_progress: bool) -> None:
        """Measures the plans, unless that is on disk, and captures them where they pay."""
        sizes = self.calibration.run(self.plans, show_progress=show_progress)
        choices = [Choice(plan, size) for plan, paying in enumerate(sizes) for size in paying]
        runner.capture(choices, show_progress=show_progress)
        sizes[SEQUENTIAL_NUMBER] = self.sizes
        self.planner = Planner(self.calibration.table, self.plans, sizes)
        runner.statistics.planner = self.planner


def plans_to_try(device_sms: int) -> list[Plan]:
    """Pipelines on the splits of `splits_to_try`."""
    return [GREEN.with_sms(split) for split in splits_to_try(device_sms)]


def splits_to_try(device_sms: int) -> list[Split]:
    """SMs of attention and FFN that fill the device: of 132, from 28+104 to 60+72."""
    splits = dict.fromkeys(split_for(device_sms, share) for share in FFN_SHARES)
    return [split for split in splits if min(split) > 0]


def split_for(device_sms: int, ffn_share: float) -> Split:
    """SMs of attention and FFN that fill the device, about `ffn_share` of them for the FFN."""
    ffn = round(device_sms * ffn_share / FFN_MULTIPLE) * FFN_MULTIPLE
    return device_sms - ffn, ffn
