"""What hardware this is, and what follows from it for memory."""

import torch

# Default bound on working memory in MB (2^20 bytes), per device type: (frozen head, trainable head). A GPU needs
# about 1024 rows x 152k columns x 2 bytes to fill its multiprocessors in the second GEMM, and about 4096 rows where
# every chunk also reads and writes the float32 gradient of the head. A CPU's trainable head wants a pair's tile whole:
# 512 tokens of 128k columns in float32 are 250 MB.
_WORKSPACE_MB = {"cpu": (64, 256), "cuda": (640, 1300)}


def workspace_bytes(workspace_mb: int | None, device: torch.device, trainable: bool) -> int:
    """The bound in bytes: the caller's, or this device's default."""
    if workspace_mb is None:
        workspace_mb = _WORKSPACE_MB.get(device.type, _WORKSPACE_MB["cuda"])[trainable]
    return workspace_mb << 20
