"""How a model's makers want its tokens to be drawn: the defaults of requests that do not say."""

from __future__ import annotations

from pathlib import Path

from nanovllm.models.rules import UnsupportedModelError
from nanovllm.sampling_params import SamplingOptions, SamplingParams
from nanovllm.utils.json_files import is_there, read_object
from nanovllm.utils.options import check_value, rule_of

FILE = "generation_config.json"
# Fields of the file that vLLM takes, too, by the fields of `SamplingParams`. As in vLLM `do_sample`
# is none of them: a request is greedy if its temperature is 0.
FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}


def sampling_defaults(directory: Path, source: str) -> SamplingOptions:
    """The fields of `SamplingParams` that the checkpoint in `directory` sets.

    `source` is that of `Config.generation_config`; "none": there are no such fields.

    Raises:
        UnsupportedModelError: the file cannot be read, or holds a value that is not allowed.
    """
    path = directory / FILE
    if source == "none" or not is_there(path):
        return {}
    given = read_object(path, UnsupportedModelError)
    try:
        defaults = {
            name: check_value(there, given[there], rule_of(SamplingParams, name))
            for name, there in FIELDS.items()
            if given.get(there) is not None
        }
    except ValueError as error:
        raise UnsupportedModelError(
            f"{path}: {error}; generation_config='none' would ignore it"
        ) from None
    return SamplingOptions(**defaults)  # type: ignore[typeddict-item]
