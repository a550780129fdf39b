"""The same job on Ray: several engines, each with GPUs of its own, share the lines.

Ray Data starts an actor for each engine, hands it blocks of lines, and takes the results as blocks
end. An actor that dies is replaced, and the blocks that it had run again. Results are written by
the driver, so its file says what is done, as with one engine.

An engine must not wait for the last lines of a block before it gets the next. So it has many blocks
at a time: each waits in a thread of the actor, and one more thread steps for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from nanovllm.batch.lines import Line, answer_line, error_line, submit
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.utils.garbage import few_full_collections

logger = logging.getLogger(__name__)

# Blocks that an engine has at a time, and how many of them it can run. Most wait for one long
# request in the end, and the others must be enough.
BLOCKS_IN_FLIGHT = 256
BLOCKS_RUNNING = 32
RESULT_BYTES = 2**18  # what Ray reserves at first for each block in flight


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Joins the Ray cluster at `address`, or starts one on this machine, which ends with this."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            f"replicas need Ray: pip install 'nano-vllm-pipeline[ray]' ({error})"
        ) from None
    ray.init(address or "local", logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = RESULT_BYTES
    try:
        yield
    finally:
        ray.shutdown()


def answers(
    config: Config, lines: Sequence[Line], chat_template: str | None, replicas: int | None
) -> Iterator[list[dict[str, Any]]]:
    """The results of all lines, block by block as they end, in the cluster that was joined."""
    import ray
    import ray.data

    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and gpus > 0)
    size = config.tensor_parallel_size
    replicas = replicas or (max(1, gpus // size) if on_gpu else 1)
    if on_gpu and replicas * size > gpus:
        raise ValueError(
            f"replicas={replicas} is not allowed: with tensor_parallel_size={size} that takes "
            f"{replicas * size} GPUs, and the cluster has {gpus}"
        )
    rows = max(1, config.max_num_seqs // BLOCKS_RUNNING)
    blocks = [
        {"lines": [json.dumps(dataclasses.asdict(line)) for line in lines[i : i + rows]]}
        for i in range(0, len(lines), rows)
    ]
    # Not more than its share, so that the first engine to be ready does not take them all.
    in_flight = min(BLOCKS_IN_FLIGHT, -(-len(blocks) // replicas))
    dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map(
        Replica,
        fn_constructor_args=(dataclasses.asdict(config), chat_template),
        num_gpus=size if on_gpu else 0,
        num_cpus=0,
        compute=ray.data.ActorPoolStrategy(
            size=replicas,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
            enable_true_multi_threading=True,
        ),
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for results in batch["results"]:
                yield [json.loads(text) for text in results]
    except ray.exceptions.RayError as error:
        *_, cause = str(error).strip().splitlines()
        raise ChildProcessError(f"replicas failed: {cause}") from error


class Replica:
    """An engine in an actor of Ray. Its blocks wait in threads of theirs; one more runs steps."""

    def __init__(self, config: dict[str, Any], chat_template: str | None) -> None:
        self.llm = LLMEngine(Config(**config))
        self.chat_template = chat_template
        self.outputs: dict[int, Future[RequestOutput]] = {}
        self.added = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """The results of a block of lines."""
        requests: list[tuple[Line, range]] = []
        results = []
        for text in block["lines"]:
            line = Line(**json.loads(text))
            try:
                requests.append((line, submit(self.llm, line, self.chat_template)))
            except (TypeError, ValueError) as error:
                results.append(error_line(line, error))
        self.added.set()
        for line, ids in requests:
            outputs = [self._output(request_id).result() for request_id in ids]
            for request_id in ids:
                del self.outputs[request_id]
            results.append(answer_line(line, outputs, self.llm.config.model))
        return {"results": [json.dumps(result) for result in results]}

    def _output(self, request_id: int) -> Future[RequestOutput]:
        """Where the step puts the output that the block takes, whichever comes first."""
        return self.outputs.setdefault(request_id, Future())

    @few_full_collections()
    def _run(self) -> None:
        try:
            while self.added.wait():
                self.added.clear()
                while not self.llm.is_finished():
                    for output in self.llm.step():
                        self._output(output["request_id"]).set_result(output)
        except BaseException:
            logger.exception("This replica ends; its blocks run again in another")
            os._exit(1)  # the threads of its blocks would wait for ever
