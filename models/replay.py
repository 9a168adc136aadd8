"""Training steps' forward and backward passes, and a sampler's evaluations, recorded as CUDA graphs and replayed.

A training step of SiT-XL launches about 1,600 kernels and copies, an evaluation about 500, which at small batches
takes the host longer than the GPU needs to run them; a graph is one launch.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

WARM_STEPS = 12  # that run as they are before the recording: compiling, choosing kernels; DDP asks for eleven


class Replay:
    """`work(*ends, *inputs)`, after `warm` steps as one graph for each value of `ends` that occurs.

    `ends` are the two marks (first, last) of the micro-batches at the ends of a training step, or nothing where every
    call is a step. Inputs are tensors, None, or tuples, lists and dataclasses of them, of the same shapes in all calls;
    when their shapes change, recording begins anew. Gradients keep their place in memory from the first recorded
    micro-batch on, and so does each graph's result, which the next call overwrites. `work` must not wait for the GPU,
    and all of it runs on the current stream.
    """

    def __init__(self, work: Callable[..., Tensor], warm: int | None = None):
        self.work, self.warm = work, WARM_STEPS if warm is None else warm
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after a change of what `work` does."""
        self.shapes, self.steps, self.graphs = None, 0, {}
        self.pool = torch.cuda.graph_pool_handle()  # one, because the graphs of a step never run at the same time

    def __call__(self, *inputs: object) -> Tensor:
        ends = tuple(mark for mark in inputs if isinstance(mark, bool))
        tensors = inputs[len(ends) :]
        shapes = [(tensor.shape, tensor.dtype) for tensor in leaves(tensors)]
        if shapes != self.shapes:
            self.forget()
            self.shapes = shapes
        self.steps += all(ends[:1])  # at a step's first micro-batch, or, without marks, at every call
        if self.steps <= self.warm:
            return self.work(*inputs)
        if ends not in self.graphs:
            self.graphs[ends] = self._record(ends, clone(tensors))
        graph, its_tensors, result = self.graphs[ends]
        torch._foreach_copy_(leaves(its_tensors), leaves(tensors), non_blocking=True)
        graph.replay()
        return result

    def _record(self, ends: tuple[bool, ...], inputs: tuple) -> tuple[torch.cuda.CUDAGraph, tuple, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():  # which cannot be recorded; without gradients any other serves
            stream = None
        with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):  # a loader pins in threads
            result = self.work(*ends, *inputs)
        return graph, inputs, result


def leaves(value: object) -> list[Tensor]:
    """The tensors in a structure, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in parts(value) for tensor in leaves(part)]


def mapped(function: Callable[[Tensor], Tensor], value: object) -> object:
    """The same structure of `function`'s results for its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    results = [mapped(function, part) for part in parts(value)]
    return type(value)(*results) if dataclasses.is_dataclass(value) else type(value)(results)


def clone(value: object) -> object:
    """The same structure with copies of its tensors."""
    return mapped(Tensor.clone, value)


def take(value: object, rows: slice) -> object:
    """The same structure of some rows of its tensors."""
    return mapped(lambda tensor: tensor[rows], value)


def parts(value: object) -> list:
    """What a structure consists of."""
    if value is None:
        return []
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value)
