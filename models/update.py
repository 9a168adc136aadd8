"""The end of a training step: clipped gradients, AdamW, and the weights' moving average, in few passes over them.

Every pass over 675 million float32 weights reads or writes 2.7 GB, so on a GPU one kernel does all but the norm
(models/adamw.py), and nothing here waits for the device.
"""

import copy

import torch
from torch import Tensor, nn

from models.agreement import everywhere, trusted_update
from models.kernels import can_fuse


class Update:
    """AdamW without weight decay on what a network trains, and the average (EMA) of these weights.

    Args:
        network: float32 weights on the training device.
        lr, beta2: of AdamW (arXiv 1711.05101); the other constants are REPA's.
        clip: largest gradient norm.
        ema_decay: of the average, warmed up as min(ema_decay, (1 + s)/(10 + s)) at step s.
        warmup: steps in which the learning rate rises to `lr`, as lr·(1 + s)/warmup; 0 starts at `lr`, as published.
    """

    def __init__(self, network: nn.Module, lr: float, beta2: float, clip: float, ema_decay: float, warmup: int = 0):
        self.lr, self.clip, self.ema_decay, self.warmup = lr, clip, ema_decay, warmup
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        self.parameters = [network.get_parameter(name) for name in trained]
        self.averages = [self.average.get_parameter(name) for name in trained]
        betas = (0.9, beta2)
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas, eps=1e-8, weight_decay=0.0, fused=True)
        self.kernel, device = None, self.parameters[0].device
        if everywhere(can_fuse(device) and trusted_update(device), device):  # or weights would drift apart
            from models.adamw import Kernel  # here, because Triton is not everywhere

            self.kernel = Kernel(self.parameters)

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """Move weights and average by the gradients of step `step`; the norm of these before clipping, ()."""
        gradients = [parameter.grad for parameter in self.parameters]
        norm = nn.utils.get_total_norm(gradients)
        share = 1 - min(self.ema_decay, (1 + step) / (10 + step))
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (1 + step) / max(1, self.warmup))
        if self.kernel and self.optimizer.state:  # which the first step makes
            states = [self.optimizer.state[parameter] for parameter in self.parameters]
            torch._foreach_add_([state["step"] for state in states], 1)
            moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
            tensors = [self.parameters, gradients, *moments, self.averages]
            self.kernel(tensors, norm, self.clip, step + 1, self.optimizer.param_groups[0], share)
        else:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimizer.step()
            torch._foreach_lerp_(self.averages, self.parameters, share)
        return norm
