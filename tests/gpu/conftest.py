import os

import torch

# without a GPU not collected, not "skipped"
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
if torch.cuda.is_available():
    # one process, and truths of millions of logits in fp64
    torch.set_num_threads(min(16, os.cpu_count() or 1))
