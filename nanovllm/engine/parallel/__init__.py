"""The ranks of a tensor-parallel run: their processes, how they meet, and what they say."""
