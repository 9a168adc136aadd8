"""The forward and backward passes of training steps, recorded as CUDA graphs and replayed.

A step of SiT-XL launches about three thousand kernels, which at small batches takes the host longer than the GPU needs
to run them; a graph is one launch.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

WARM_STEPS = 12  # that run as they are before the recording: compiling, choosing kernels; DDP asks for eleven


class Replay:
    """`micro_step(first, last, *inputs)`, one graph for each (first, last) that occurs in a step.

    `first` and `last` mark the micro-batches at the ends of a step. Inputs are tensors, None, or tuples, lists and
    dataclasses of them, of the same shapes in all micro-batches; when their shapes change, recording begins anew.
    Gradients keep their place in memory from the first recorded micro-batch on, and so does each graph's result, which
    the next call overwrites. `micro_step` must not wait for the GPU, and all of it runs on the current stream.
    """

    def __init__(self, micro_step: Callable[..., Tensor]):
        self.micro_step = micro_step
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after a change of what `micro_step` does."""
        self.shapes, self.steps, self.graphs = None, 0, {}
        self.pool = torch.cuda.graph_pool_handle()  # one, because the graphs of a step never run at the same time

    def __call__(self, first: bool, last: bool, *inputs: object) -> Tensor:
        shapes = [(tensor.shape, tensor.dtype) for tensor in leaves(inputs)]
        if shapes != self.shapes:
            self.forget()
            self.shapes = shapes
        self.steps += first
        if self.steps <= WARM_STEPS:
            return self.micro_step(first, last, *inputs)
        if (first, last) not in self.graphs:
            self.graphs[first, last] = self._record(first, last, clone(inputs))
        graph, its_inputs, result = self.graphs[first, last]
        torch._foreach_copy_(leaves(its_inputs), leaves(inputs), non_blocking=True)
        graph.replay()
        return result

    def _record(self, first: bool, last: bool, inputs: tuple) -> tuple[torch.cuda.CUDAGraph, tuple, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):  # a loader pins in threads
            result = self.micro_step(first, last, *inputs)
        return graph, inputs, result


def leaves(value: object) -> list[Tensor]:
    """The tensors in a structure, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in parts(value) for tensor in leaves(part)]


def clone(value: object) -> object:
    """The same structure with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    copies = [clone(part) for part in parts(value)]
    return None if value is None else type(value)(*copies) if dataclasses.is_dataclass(value) else type(value)(copies)


def parts(value: object) -> list:
    """What a structure consists of."""
    if value is None:
        return []
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value)
