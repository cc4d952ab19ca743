"""Layers of networks."""

import torch

# PyTorch 2.14 finds its cached code by the graph and the number of threads, but not by the vector unit for which it was
# generated: with a cache folder that machines share, those with AVX2 computed NaN by the code of those with AVX-512.
torch.compiler.config.cache_key_tag += torch.backends.cpu.get_cpu_capability()
