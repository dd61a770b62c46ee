"""Models on devices. The only room that imports torch and numba; it speaks token ids, never text.

Start reading at `llm_engine.py`: its `step()` is the whole loop.
"""

import os

# Read once, when torch's OpenMP library is loaded; our compiled kernels share its threads. A thread that spins
# while it waits holds a core that the gateway beside us may want: sleeping costs microseconds on an idle machine,
# spinning cost whole time slices on a busy one (a decode step of 0.08 s took 0.4 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
