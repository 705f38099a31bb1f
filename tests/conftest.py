"""What all tests share: one thread each, because they run side by side."""

import torch

torch.set_num_threads(1)
