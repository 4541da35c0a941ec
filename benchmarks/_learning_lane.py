"""A step of `benchmarks/learning.py`: one set of weights, their moments, and on a GPU the graphs of a step."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from _learning import Size
from _learning_model import optimizer_of
from torch import Tensor, nn

CLIP = 1.0


class Lane:
    """Weights and moments of one run, for a model that several runs share.

    The model is compiled once. Before it runs, its parameters are given the tensors of the lane. On a GPU forward and
    backward are one CUDA graph, and the update is another: graphs keep the addresses that they were captured with, so
    each lane has its own, and those of several lanes run side by side, each on the stream of its lane. (Work spaces of
    matrix products belong to the stream that a graph was captured on.)
    """

    def __init__(self, model: nn.Module, call: nn.Module, contestant: str, size: Size) -> None:
        self.model, self.call = model, call
        self.parameters = list(model.parameters())
        self.weights = [p.detach().clone() for p in self.parameters]
        device = self.weights[0].device
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.tokens = torch.zeros(size.batch, size.length, dtype=torch.long, device=device)
        self.optimizer = optimizer_of(model, contestant)
        self.rates = torch.zeros(len(self.optimizer.param_groups), device=device)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.use()
        # The moments are there from now on.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self.loss = torch.zeros((), device=device)

    def use(self) -> None:
        """Let the model compute with the weights of this lane."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.data = weight

    def begin(self, values: dict[str, Tensor]) -> None:
        """Start from ``values``, by the names of the parameters, with no moments."""
        for (name, _), weight in zip(self.model.named_parameters(), self.weights, strict=True):
            weight.copy_(values[name])
        for tensor in self.moments:
            tensor.zero_()

    def step(self, batch: Tensor, rates: Tensor, *, captured: bool = True) -> None:
        """One step of training on ``batch``, ``[batch, length]``, with a learning rate a parameter group.

        The loss before it is in ``loss``. Without ``captured`` graphs are left alone.
        """
        self.tokens.copy_(batch)
        self.rates.copy_(rates)
        if captured and self.graphs is not None:
            for graph in self.graphs:
                graph.replay()
        else:
            self.loss.copy_(self._backward())
            self._update()

    def held_out_loss(self, batches: Tensor) -> Tensor:
        """Mean loss of ``batches``, ``[n, batch, length]``, in nats a byte; a scalar on the device."""
        losses = torch.zeros(len(batches), device=self.tokens.device)
        if self.graphs is not None:
            # Compiling a forward of its own would take longer than all the gradients that are thrown away.
            for loss, batch in zip(losses, batches, strict=True):
                self.tokens.copy_(batch)
                self.graphs[0].replay()
                loss.copy_(self.loss)
            return losses.mean()
        self.use()
        self.call.eval()
        with torch.no_grad():
            for loss, batch in zip(losses, batches, strict=True):
                loss.copy_(self._forward(batch.long()))
        self.call.train()
        return losses.mean()

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """What steps and losses are computed in."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def capture(self) -> None:
        """Compile the step, and on a GPU capture it; the weights are not to be used afterwards."""
        self.rates.zero_()
        self._backward()
        self._update()
        if self.stream is None:
            return
        torch.cuda.synchronize()
        try:
            self._capture(self.stream)
        except Exception as error:
            torch.cuda.synchronize()
            print(f"not captured, so launches bind the step: {type(error).__name__}: {error}", flush=True)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._backward()
                self._update()
        torch.cuda.synchronize()
        backward, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(backward, stream=stream):
            self.loss = self._backward()
        # The graphs write to them and read them, whatever other lanes give to the parameters.
        self._gradients = [parameter.grad for parameter in self.parameters]
        with torch.cuda.graph(update, stream=stream):
            self._update()
        with torch.cuda.stream(stream):
            backward.replay()
            update.replay()
        torch.cuda.synchronize()
        self.graphs = backward, update

    def _backward(self) -> Tensor:
        self.use()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(self.tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()

    def _forward(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.call(input_ids=batch, labels=batch).loss
        return loss
