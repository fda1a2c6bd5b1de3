"""What must hold before anything else is imported."""

import os

# Triton reads it when it is imported: our kernels are tested in its interpreter, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
