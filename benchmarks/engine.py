"""How fast the engine is by itself.

python benchmarks/engine.py [--model M] [--concurrency 1,16,64] [--input 128] [--output 128] [--json FILE]
"""

from springtide.engine.bench import main

if __name__ == "__main__":
    main()
