"""`python -m nanovllm.bench`, from a checkout."""

import sys

try:
    from nanovllm.bench.__main__ import main
except KeyboardInterrupt:  # torch takes its time
    sys.exit(130)

if __name__ == "__main__":
    main()
