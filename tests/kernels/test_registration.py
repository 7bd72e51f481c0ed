"""Where torch is built for CUDA, the ops' CUDA forms stand at their dispatch key: importing the package is enough."""

import subprocess
import sys

PROGRAM = """
import torch
assert torch.version.hip is None
torch.version.cuda = "13.0"  # what decides; no GPU is asked for
import synpo_kernels
for op in ("softmax_sums", "softmax_grads", "softmax_store", "tile_grads", "synpo_loss", "prefix_attention"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"synpo::{op}", "CUDA"), op
"""


def test_the_cuda_forms_are_registered_by_importing_the_package() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
