"""Completes a few prompts with the attention/FFN pipeline switched on.

python example_pipeline.py                                  the embedded tiny model, any machine
python example_pipeline.py --model Qwen/Qwen3-0.6B          any supported checkpoint
python example_pipeline.py --timeline steps.json            for ui.perfetto.dev
python example_pipeline.py --timeline steps.png             the same as a picture
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import numpy  # noqa: F401  torch would swallow a Ctrl-C while it imports it

    from nanovllm import LLM, Config, SamplingParams
    from nanovllm.config import PIPELINE_MODES
    from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS
    from nanovllm.utils.command_line import Parser, in_one_line, output, text
except KeyboardInterrupt:  # torch takes its time
    sys.exit(130)


def parse_arguments() -> argparse.Namespace:
    parser, default = Parser(__doc__), Config()
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT_DIR), help="directory or hub id")
    add("--prompt", type=text, action="append", help="may be given several times")
    add("--max-tokens", type=int, default=128, help="of each completion")
    add("--temperature", type=float, default=0.0, help="0: greedy (default)")
    add("--device", default=default.device, help="'auto', 'cpu', 'cuda' or 'cuda:N'")
    add("--mode", default=default.pipeline_mode, choices=PIPELINE_MODES, help="see README")
    add("--attention-sms", type=int, default=default.pipeline_attention_sm_count, metavar="N",
        help="SMs of the attention lane in mode green")  # fmt: skip
    add("--ffn-sms", type=int, default=default.pipeline_ffn_sm_count, metavar="N",
        help="SMs of the FFN lane in mode green")  # fmt: skip
    add("--enforce-eager", action="store_true", help="without CUDA graphs")
    add("--timeline", type=output(".png", ".json"), metavar="FILE",
        help="draw (.png) or trace (.json) the stages of the last steps")  # fmt: skip
    args = parser.parse_args()
    if args.timeline is not None and args.max_tokens < 2:
        parser.error("--timeline shows decode steps: --max-tokens must be at least 2")
    return args


def main() -> None:
    with in_one_line(Path(__file__).name, ValueError, OSError, MemoryError):
        args = parse_arguments()
        prompts = args.prompt or list(PROMPTS[:8])
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        with LLM(
            args.model,
            device=args.device,
            enforce_eager=args.enforce_eager,
            enable_pipeline=True,
            pipeline_mode=args.mode,
            pipeline_attention_sm_count=args.attention_sms,
            pipeline_ffn_sm_count=args.ffn_sms,
            pipeline_enable_profiling=True,
        ) as llm:
            outputs = llm.generate(prompts, params)
            for prompt, output in zip(prompts, outputs, strict=True):
                print(f"\n{prompt!r}\n  -> {output['text']!r} ({output['finish_reason']})")
            print()
            llm.model_runner.print_pipeline_statistics()
            if args.timeline is not None:
                llm.model_runner.save_timeline(str(args.timeline))
                print(f"Timeline written to {args.timeline}")


if __name__ == "__main__":
    main()
