"""Models on devices. The only room that imports torch and numba; it speaks token ids, never text.

Start reading at `llm_engine.py`: its `step()` is the whole loop.
"""

import os

# OpenMP reads this once, when torch is first imported. A step has hundreds of short parallel parts; threads that
# spin between them need every core for themselves, and the gateway, the fabric and the clients run here too: where
# cores are shared, spinning makes a step five to twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
