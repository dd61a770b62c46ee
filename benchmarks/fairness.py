"""Whether tenants get the shares that their weights say, through any number of gateways, and a quiet one its calm.

python benchmarks/fairness.py [--seconds 60] [--seed 1] [--json FILE]
"""

import sys

from springtide.cli.bench import app

if __name__ == "__main__":
    app(["fleet", "--only", "fairness", *sys.argv[1:]])
