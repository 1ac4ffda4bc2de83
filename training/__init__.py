"""Training, evaluation and the teacher: drives `models` and `service`."""

import os

# Read by OpenMP when torch is first loaded. Its threads otherwise spin while they wait, and a spinning thread takes the
# core from the process that prepares the next batch: on two busy cores a step took seven times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
