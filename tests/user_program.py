"""What users write, right and wrong: tests/test_package.py has a type checker read it.

A line that ends in `# error: CODE` is a mistake that the type checker must find.
"""

from pathlib import Path

from typing_extensions import assert_type

from nanovllm import LLM, Config, LLMEngine, Logprob, SamplingParams, __version__
from nanovllm.engine.outputs import Completion, Delta

assert_type(__version__, str)

LLM()
LLM("Qwen/Qwen3-0.6B")
LLM(model="Qwen/Qwen3-0.6B", enable_pipeline=True, pipeline_mode="green")
LLM(Path("models") / "qwen", max_num_seqs=4, gpu_memory_utilization=1)
LLM(Config(dtype="float32"), device="cpu")
LLM("model", max_seqs=4)  # error: call-arg
LLM("model", max_num_seqs="4")  # error: arg-type
LLM("model", dtype="float8")  # error: arg-type
LLM("model", pipeline_mode="fast")  # error: arg-type
LLM(5)  # error: arg-type
LLMEngine("model", gpu_memory=0.5)  # error: call-arg

config = Config("model", attention_backend="torch")
config.max_num_seqs = 4
config.max_num_seqs = "4"  # error: assignment
config.max_seqs = 4  # error: attr-defined
Config(max_seqs=4)  # error: call-arg
Config(load_format="gguf")  # error: arg-type

params = SamplingParams(temperature=0, stop_token_ids=[1, 2], seed=None)
SamplingParams(stop_token_ids={1, 2})
SamplingParams(logit_bias={5: -1.5, 6: 2}, presence_penalty=0.5, min_p=0.1)
SamplingParams(logit_bias=[5])  # error: arg-type
SamplingParams(top_kk=5)  # error: call-arg
SamplingParams(top_k=0.5)  # error: arg-type
SamplingParams(stop_token_ids="12")  # error: arg-type
params.top_k = 5  # error: misc

with LLM() as llm:
    outputs = llm.generate(["One", [2, 3]], params)
    assert_type(outputs, list[Completion])
    assert_type(outputs[0]["text"], str)
    print(outputs[0]["txt"])  # error: typeddict-item
    llm.generate("One", [params], use_tqdm=False)
    llm.generate(["One", {"prompt": "Two"}, {"prompt_token_ids": [3, 4]}])
    llm.generate([1])  # error: list-item
    llm.generate("One", temperature=0.5, top_k=5, stop_token_ids=(1, 2))
    (one,) = llm.generate("One", logprobs=5, prompt_logprobs=0)
    assert_type(one["logprobs"], list[dict[int, Logprob]] | None)
    llm.generate("One", logprobs="5")  # error: arg-type
    llm.generate("One", max_new_tokens=5)  # error: call-arg
    llm.generate("One", max_tokens="5")  # error: arg-type
    llm.generate(5)  # error: arg-type
    llm.generate("One", stop="two", n=2, max_tokens=None, skip_special_tokens=False)
    llm.generate("One", stop=5)  # error: arg-type
    for completion in llm.stream(["One"], stop=["two"]):
        assert_type(completion, Completion)
        assert_type(completion["stop_reason"], str | int | None)
    for delta in llm.stream("One", params, deltas=True):
        assert_type(delta, Delta)
        print(delta["text"], delta["stop_reason"])  # error: typeddict-item
    llm.add_request("One", max_tokens=5, ignore_eos=True)
    llm.add_request("One", tokens=5)  # error: call-arg
    llm.add_request("One", seed="5")  # error: arg-type
