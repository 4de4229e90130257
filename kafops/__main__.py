"""`python -m kafops`: which version this is, what computes here, and what else there is to run."""

import torch

import kafops

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

print(f"kafops {kafops.__version__}, torch {torch.__version__}")
for device in DEVICES:
    print(f"{device}: {kafops.backends.explain(device)}")
print("\npython -m kafops.check   compares the kernels with the float64 reference on this machine")
