"""Mode "auto": several plans for a decode step stand ready, and a planner picks one each time.

They are sequential decode and pipelines on several splits of the SMs. Whatever the planner picks
has its graph already, so that a switch costs nothing. How long a step took on the device, between
two events, goes back to the planner.
"""

from __future__ import annotations

from nanovllm.engine.calibration import Calibration
from nanovllm.engine.cost_table import CostTable
from nanovllm.engine.plan import GREEN, Plan
from nanovllm.engine.planner import Choice as Prediction
from nanovllm.engine.planner import Planner
from nanovllm.engine.step_runner import Choice, FixedPlan, StepRunner

# The FFN gets a group of whole multiples of this many SMs, about these shares of all of them.
FFN_MULTIPLE = 8
FFN_SHARES = (0.79, 0.72, 0.67, 0.61, 0.55)
Split = tuple[int, int]


class AutoPlan(FixedPlan):
    """Lets a planner choose the plan of each decode step.

    Args:
        runner: has the plans, and captures graphs.
        calibration: measures what the plans cost.
    """

    def __init__(self, runner: StepRunner, calibration: Calibration) -> None:
        super().__init__(runner.schedulers, runner.memory)
        self.plans = [scheduler.plan for scheduler in runner.schedulers]
        self.sizes = [] if runner.memory is None else runner.memory.sizes
        self.calibration = calibration
        self.statistics = runner.statistics
        # They are of all plans, so they name no single split.
        self.statistics.mode, self.statistics.lane_sms = "auto", {}
        self.statistics.device_sms = None
        self.planner = self.statistics.planner = Planner(CostTable(), {self.plans[0]: self.sizes})

    def choose(self, num_seqs: int, tokens: int) -> Choice:
        chosen = self.planner.choose(num_seqs, tokens)
        timed = chosen.seconds is not None
        return Choice(self.plans.index(chosen.plan), chosen.batch, chosen if timed else None)

    def observe(self, prediction: Prediction, seconds: float) -> None:
        self.planner.observe(prediction, seconds)

    def capture(self, runner: StepRunner, *, show_progress: bool) -> None:
        """Captures sequential decode, then prepares the choice."""
        runner.capture([Choice(0, size) for size in self.sizes], show_progress=show_progress)
        self.calibrate(runner, show_progress=show_progress)

    def calibrate(self, runner: StepRunner, *, show_progress: bool) -> None:
        """Measures the plans, unless that is on disk, and captures those that can be worth it."""
        worthwhile = self.calibration.run(self.plans, show_progress=show_progress)
        sizes = {plan: sorted(worthwhile.get(plan, ())) for plan in self.plans}
        runner.capture(
            [Choice(self.plans.index(plan), size) for plan in worthwhile for size in sizes[plan]],
            show_progress=show_progress,
        )
        sizes[self.plans[0]] = self.sizes
        self.planner = self.statistics.planner = Planner(self.calibration.table, sizes)


def splits_to_try(device_sms: int) -> list[Split]:
    """SMs of attention and FFN that fill the device: of 132, from 28+104 to 60+72."""
    splits = [split_for(device_sms, share) for share in FFN_SHARES]
    return [split for split in dict.fromkeys(splits) if min(split) > 0]


def plans_to_try(device_sms: int) -> list[Plan]:
    """Pipelines on those splits."""
    return [GREEN.with_sms(split) for split in splits_to_try(device_sms)]


def split_for(device_sms: int, ffn_share: float) -> Split:
    """SMs of attention and FFN that fill the device, about `ffn_share` of them for the FFN."""
    ffn = round(device_sms * ffn_share / FFN_MULTIPLE) * FFN_MULTIPLE
    return device_sms - ffn, ffn
