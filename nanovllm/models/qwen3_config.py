"""The old name of `ModelConfig`, until nanovllm/bench no longer asks for it."""

from nanovllm.models.config import ModelConfig, load_config, parse_config


class Qwen3Config(ModelConfig):  # type: ignore[misc]
    from_dict = staticmethod(parse_config)
    from_directory = staticmethod(load_config)
