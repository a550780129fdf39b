"""From requests to tokens: scheduler, KV blocks, runner, pipeline."""
