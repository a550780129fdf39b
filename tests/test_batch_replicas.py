"""`python -m nanovllm.batch --replicas`: the same job on Ray, where replicas and drivers die."""

import importlib.util
import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from nanovllm.batch.__main__ import main
from nanovllm.batch.lines import parse
from nanovllm.batch.replicas import Replica
from tests import scripts
from tests.batch_jobs import TEMPLATE, arguments, read, request, stories, write
from tests.bench_runs import refusal

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
CONFIG = {"device": "cpu", "max_num_seqs": 4}


def block(requests: list[dict]) -> dict[str, list[str]]:
    """What Ray gives a replica."""
    lines = [parse(i, json.dumps(each).encode()) for i, each in enumerate(requests, start=1)]
    return {"lines": [json.dumps(asdict(line)) for line in lines]}


def test_blocks_of_several_threads_get_the_results_of_their_lines():
    replica = Replica(CONFIG, TEMPLATE)
    given = stories(count=60)
    chat = request("chat", messages=[{"role": "user", "content": "Tom"}], max_tokens=3)
    blocks = [[*given[i : i + 6], chat] for i in range(0, 60, 6)]
    with ThreadPoolExecutor(len(blocks)) as threads:
        answered = list(threads.map(replica, map(block, blocks)))
    for requests, answer in zip(blocks, answered, strict=True):
        results = {result["custom_id"]: result for result in map(json.loads, answer["results"])}
        assert set(results) == {each["custom_id"] for each in requests}
        for each in requests:
            result = results[each["custom_id"]]
            if each["body"].get("temperature") == -1:
                assert "temperature=-1" in result["error"]["message"]
            else:
                tokens = result["response"]["body"]["usage"]["completion_tokens"]
                assert 1 <= tokens <= each["body"]["max_tokens"]
    assert not replica.outputs
    replica.llm.exit()


DYING = """
from nanovllm.batch.replicas import Replica
from tests.test_batch_replicas import CONFIG, block, stories
replica = Replica(CONFIG, None)
replica.llm.step = lambda: 1 / 0
replica(block(stories(count=3)))
"""


def test_a_replica_whose_engine_fails_ends_at_once():
    """Else its blocks would wait for ever, and Ray could not start another."""
    done = scripts.run("-c", DYING)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_replicas_are_refused(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", stories(count=3))
    for option in (("--replicas", 2), ("--ray-address", "auto")):
        err = refusal(capsys, main, *arguments(source, tmp_path / "out.jsonl", *option))
        assert "nano-vllm-pipeline[ray]" in err


def descendants(pid: int) -> dict[int, str]:
    """Process ids, and the command lines, of all that a process has started."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue  # it has ended
    found, new = {}, {pid}
    while new := {child for child, parent in parents.items() if parent in new}:
        found.update({child: names[child] for child in new})
    return found


def is_each_line_answered_once(output: Path, given: list[dict]) -> bool:
    return Counter(result["custom_id"] for result in read(output)) == Counter(
        each["custom_id"] for each in given
    )


@needs_ray
def test_jobs_go_on_when_a_replica_dies_and_when_the_driver_does(tmp_path):
    given = stories(count=200, tokens=20)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    output.touch()
    options = arguments(source, output, "--max-num-seqs", 8, "--replicas", 2)
    for victim in ("replica", "driver"):
        output.write_bytes(b"")
        driver = scripts.start("-m", "nanovllm.batch", *options)
        while output.stat().st_size == 0:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.05)
        processes = descendants(driver.pid)
        if victim == "driver":
            driver.kill()
            driver.communicate()
            assert len(read(output)) < len(given)
            actors = [pid for pid, name in processes.items() if "Replica" in name]
            assert actors
            assert scripts.seconds_to_end(actors, 60) is not None  # for they hold the GPUs
            main(options[:-2])
        else:
            os.kill(next(i for i, name in processes.items() if "Replica" in name), signal.SIGKILL)
            assert driver.communicate(timeout=600)[1].endswith(
                f"{output}: 200 results, 20 of them errors\n"
            )
        assert is_each_line_answered_once(output, given)
