"""What the platform adds to an engine: latency, requests and chunks per second.

python benchmarks/api.py [--seconds 5] [--runs 3] [--json FILE]
"""

import sys

from springtide.cli.bench import app

if __name__ == "__main__":
    app(["api", *sys.argv[1:]])
