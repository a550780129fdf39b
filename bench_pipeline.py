"""`python -m nanovllm.bench`, from a checkout."""

from nanovllm.bench.__main__ import main

if __name__ == "__main__":
    main()
