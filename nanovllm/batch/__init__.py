"""Batch files: many requests in a file, their answers in another.

    python -m nanovllm.batch in.jsonl out.jsonl --model Qwen/Qwen3-0.6B

lines.py     a line of each file: what it asks for, and what answers it
results.py   the file of answers, to which a job that was killed is added when it starts again
replicas.py  several engines in the place of one, by Ray
__main__.py  the command, and the loop that keeps the engine busy
"""
