"""Whether anything is lost while replicas, agents, lines and the fabric fail; and while gateways do.

python benchmarks/chaos.py [--gateways] [--seconds 300] [--seed 1] [--fabric-servers 3] [--engine real] [--json FILE]
"""

import sys

from springtide.cli.bench import app

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--gateways"]
    app(["fleet", "--only", "gateways" if "--gateways" in sys.argv else "chaos", *arguments])
