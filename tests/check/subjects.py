"""The kernels of a function as the certificate takes them: built for a target, each with what PyTorch computes for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from flagtree.check.certify import Subject
from flagtree.check.eager import eager_of
from flagtree.check.experts_eager import in_pieces
from flagtree.check.recipe import NoEager
from flagtree.check.stored import Description, subject_of
from flagtree.ir.canonical import digest, isolate_all
from flagtree.lower.lowering import Lowered
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.targets.base import Target
from flagtree.toolchain.build import toolchain_of
from tests.codegen.test_triton_experts import lowered_export


def lowered_function_of(function: Callable, operands: tuple[torch.Tensor, ...], most: int) -> tuple[fx.Graph, Lowered]:
    """Graph and program of a function whose operands of as many rows as the first have any number of them up to `most`."""

    class Whole(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    rows = torch.export.Dim("rows", min=1, max=most)
    free = (tuple({0: rows} if t.ndim > 1 and len(t) == len(operands[0]) else None for t in operands),)
    return lowered_export(torch.export.export(Whole(), operands, dynamic_shapes=free))


def subjects_of(function: Callable, operands: tuple[torch.Tensor, ...], target: Target, most: int = 4096) -> list[Subject]:
    """Of `lowered_function_of`."""
    return subjects(*lowered_function_of(function, operands, most), target)


def subjects(graph: fx.Graph, before: Lowered, target: Target) -> list[Subject]:
    """Of a graph and its program as lowered; operators that PyTorch has in pieces only are taken apart."""
    program, _ = run_pipeline(before.program, pipeline(target), target)
    graph, found = in_pieces(graph), []
    for kernel, alone in isolate_all(program):
        try:
            told = Description(kernel, alone, eager_of(graph, program, kernel, alone, before.symbols))
        except NoEager as error:
            told = Description(kernel, alone, None, error.why)
        key = digest(alone.program)
        (built,) = toolchain_of(target).build([(key, alone.program)], target, 1)  # type: ignore[call-arg]
        found.append(subject_of(key, told, built))
    return found
