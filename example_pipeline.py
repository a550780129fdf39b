"""Completes a few prompts with the attention/FFN pipeline switched on.

python example_pipeline.py                                  the embedded tiny model, any machine
python example_pipeline.py --model Qwen/Qwen3-0.6B          any Qwen3 checkpoint
python example_pipeline.py --timeline steps.json            for ui.perfetto.dev
python example_pipeline.py --timeline steps.png             the same as a picture
"""

from __future__ import annotations

import argparse

from nanovllm import LLM, Config
from nanovllm.config import PIPELINE_MODES
from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Config()
    parser.add_argument("--model", default=str(CHECKPOINT_DIR), help="directory or hub id")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--mode", default=default.pipeline_mode, choices=PIPELINE_MODES)
    parser.add_argument(
        "--attention-sms", type=int, default=default.pipeline_attention_sm_count, metavar="N"
    )
    parser.add_argument("--ffn-sms", type=int, default=default.pipeline_ffn_sm_count, metavar="N")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--timeline", metavar="FILE", help="write the stages of the last steps")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    prompts = args.prompt or list(PROMPTS[:8])
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
        outputs = llm.generate(prompts, max_tokens=args.max_tokens, temperature=args.temperature)
        for prompt, output in zip(prompts, outputs, strict=True):
            print(f"\n{prompt!r}\n  -> {output['text']!r} ({output['finish_reason']})")
        print()
        llm.model_runner.print_pipeline_statistics()
        if args.timeline:
            llm.model_runner.save_timeline(args.timeline)
            print(f"Timeline written to {args.timeline}")


if __name__ == "__main__":
    main()
