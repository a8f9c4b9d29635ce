import os

import torch

collect_ignore_glob = (
    [] if torch.cuda.is_available() else ["test_*.py"]
)  # without a GPU not collected, not "skipped"
if torch.cuda.is_available():
    torch.set_num_threads(
        min(16, os.cpu_count() or 1)
    )  # one process, and truths of millions of logits in fp64
