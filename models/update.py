"""The end of a training step: clipped gradients, AdamW, and the weights' moving average, in few passes over them.

Every pass over 675 million float32 weights reads or writes 2.7 GB, so on a GPU the clipping coefficient is applied
inside the fused AdamW kernel instead of in a pass of its own, and nothing here waits for the device.
"""

import copy

import torch
from torch import Tensor, nn


class Update:
    """AdamW without weight decay on what a network trains, and the average (EMA) of these weights.

    Args:
        network: float32 weights on the training device.
        lr, beta2: of AdamW (arXiv 1711.05101); the other constants are REPA's.
        clip: largest gradient norm.
        ema_decay: of the average, warmed up as min(ema_decay, (1 + s)/(10 + s)) at step s.
    """

    def __init__(self, network: nn.Module, lr: float, beta2: float, clip: float, ema_decay: float):
        self.clip, self.ema_decay = clip, ema_decay
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        self.parameters = [network.get_parameter(name) for name in trained]
        self.averages = [self.average.get_parameter(name) for name in trained]
        betas = (0.9, beta2)
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas, eps=1e-8, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """Move weights and average by the gradients of step `step`; the norm of these before clipping, ()."""
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        if norm.is_cuda:
            self.optimizer.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1)  # the kernel divides by it
        else:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.optimizer.step()
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        return norm
