"""The engine on a real GPU: logits, tokens and memory, with and without CUDA graphs."""

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nanovllm import SamplingParams
from nanovllm.bench.shapes import published_config
from tests import logit_oracle
from tests.checkpoints import TABLE, Shape, greedy, prompts
from tests.checkpoints import VOCAB as SHAPE_VOCAB
from tests.decode_cases import relative_error
from tests.gpu.forced_tokens import forced_logits, forced_token, ragged_prompts
from tests.gpu.texts import small_engine, texts

VOCAB = 4096
EAGER = pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
GREEN = {"enable_pipeline": True, "pipeline_mode": "green", "pipeline_strict": True}
SETUPS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "green graphs": GREEN,
    "green eager": {**GREEN, "enforce_eager": True},
}


# As published, for what config.json of that model says beside Qwen3's shapes.
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def write_rounded_model(directory: Path, shape: str) -> transformers.PreTrainedModel:
    """Saves two random layers in bfloat16; returns the same weights in float32, on the GPU."""
    published = OTHERS[shape] if shape in OTHERS else published_config(shape)
    more = {"num_hidden_layers": 2, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(**{**published, **more})
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):  # transformers begins with zeros
            torch.nn.init.normal_(weight, 0.0, 0.1)
    model.to(torch.bfloat16).save_pretrained(directory)
    # Rounded once more in bfloat16, `inv_freq` would be wrong: a model built anew has it right.
    with torch.device("cuda"):
        exact = transformers.AutoModelForCausalLM.from_config(config)
    exact.load_state_dict({name: w.float() for name, w in model.state_dict().items()})
    return exact.float().eval()


@torch.inference_mode()
def exact_logits(
    model: transformers.PreTrainedModel, given: list[list[int]], steps: int
) -> torch.Tensor:
    """What `forced_logits` should be, by transformers in float32."""
    forced = [forced_token(step) for step in range(steps - 1)]
    rows = [
        model(torch.tensor([[*prompt, *forced]], device="cuda")).logits[0, len(prompt) - 1 :]
        for prompt in given
    ]
    return torch.stack(rows, dim=1).cpu()


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ("0.6B", 5),
        ("8B", 5),
        ("0.6B", 20),
        *((other, count) for other in OTHERS for count in (5, 20)),
    ],
)
def test_bfloat16_logits_are_near_those_of_transformers_in_float32(
    tmp_path, monkeypatch, shape, count
):
    model = write_rounded_model(tmp_path, shape)
    given = ragged_prompts(count, 600, VOCAB)
    expected = exact_logits(model, given, steps=5)
    del model
    found = {}
    for eager in (False, True):
        room = {"max_num_seqs": count, "num_kvcache_blocks": 8 * count}
        with small_engine(tmp_path, dtype="bfloat16", enforce_eager=eager, **room) as engine:
            logits = found[eager] = forced_logits(monkeypatch, engine, given, steps=5)
        assert relative_error(logits[0], expected[0]) < 2e-2, "prefill"
        for step in range(1, 5):
            assert relative_error(logits[step], expected[step]) < 2e-2, f"decode step {step}"
    assert relative_error(found[False], found[True]) < 2e-2


@EAGER
@pytest.mark.parametrize("model_type", TABLE)
@pytest.mark.parametrize("seed", range(3))
def test_float32_tokens_equal_those_of_transformers(tmp_path, seed, model_type, eager):
    model = Shape.random(seed, model_type).write(tmp_path)
    given = prompts(seed, count=6)
    options = {"dtype": "float32", "enforce_eager": eager, "kvcache_block_size": 16}
    with small_engine(tmp_path, max_model_len=128, **options) as engine:
        outputs = engine.generate(given, temperature=0, max_tokens=20, use_tqdm=False)
    expected = [greedy(model, prompt, 20) for prompt in given]
    assert [output["token_ids"] for output in outputs] == expected


@EAGER
def test_changed_logits_give_the_tokens_of_a_plain_loop(tmp_path, eager):
    """The device keeps the history while the host is a step behind."""
    model, given, rng = Shape(seed=5).write(tmp_path), prompts(4, count=12), random.Random(0)
    params = [
        SamplingParams(
            temperature=0, max_tokens=20, **logit_oracle.random_changes(rng, SHAPE_VOCAB)
        )
        for _ in given
    ]
    options = {"dtype": "float32", "enforce_eager": eager, "kvcache_block_size": 16}
    with small_engine(tmp_path, max_model_len=128, num_kvcache_blocks=20, **options) as engine:
        outputs = engine.generate(given, params, use_tqdm=False)
    pairs = zip(given, params, strict=True)
    expected = [logit_oracle.greedy(model, prompt, each, {1}) for prompt, each in pairs]
    assert [output["token_ids"] for output in outputs] == expected


@EAGER
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_embedded_model_writes_the_same_text_as_on_the_cpu(dtype, eager, cpu_texts):
    with small_engine(dtype=dtype, enforce_eager=eager) as engine:
        assert texts(engine) == cpu_texts[:8]


@pytest.mark.parametrize("setup", ["graphs", "green graphs"])
def test_an_engine_gives_its_memory_back(setup):
    def free_after(engines: int) -> int:
        for _ in range(engines):
            with small_engine(num_kvcache_blocks=512, **SETUPS[setup]) as engine:
                texts(engine, count=4)
            del engine
            gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    before = free_after(2)  # the first ones compile kernels and fill the libraries' own pools
    lost = before - free_after(3)
    # The driver keeps 4 MiB of every green context; see test_green_ctx.py, which measures it.
    kept = 3 * 2 * (4 << 20) if setup == "green graphs" else 0
    assert lost < kept + (16 << 20), f"3 engines cost {lost / (1 << 20):.1f} MiB of device memory"


@pytest.mark.parametrize("setup", SETUPS)
def test_decode_steps_allocate_nothing_that_stays(setup):
    def run(steps: int) -> int:
        for _ in range(steps):
            assert engine.step() == []
        return torch.cuda.memory_allocated()

    with small_engine(**SETUPS[setup]) as engine:
        for prompt in ragged_prompts(3, 200, 1024):  # 3 of a graph's 4 rows
            engine.add_request(prompt, temperature=0.7, max_tokens=700, ignore_eos=True)
        before = run(40)
        assert run(500) == before
        assert len(engine.requests) == 3
