"""vLLM plug-ins (entry points `vllm.general_plugins`) that mend its CPU engine.

`tunegate_cpu_lora`: each row gets the weights of its own adapter or none. vLLM marks a row that uses no adapter with
slot index -1. Its CPU operators index the stacked adapter weights with that number, which in torch is the last slot: in
a batch that mixes rows, those without an adapter are answered with the weights of whichever adapter lies there. They
also gather a copy of the weights for every row: reading a prompt with an adapter takes many times as long as without.
Here each slot's rows are multiplied at once, and rows without one are left at zero.

Logits are computed for one row a request, and vLLM knows the slots of those rows. For the logprobs of a prompt it
computes the logits of all of one request's rows, and takes the same slots: where the numbers differ, the engine dies.
They are given the slot of that request instead.

`tunegate_cpu_seed`: a request with `seed` has a generator of its own. Where a step reads only a piece of its prompt,
vLLM draws a token from the unfinished logits all the same, drops it, and sets the generator back by an offset that
only a CUDA generator has: on the CPU the engine dies. Such a generator is kept out of the step instead. Nothing is
drawn from it, so the answer is the same however the prompt was cut.

`VLLM_PLUGINS` (a comma-separated list of plug-ins to load) without one of these names switches that one off.
"""

from typing import Any

import torch


def mend_lora() -> None:
    """Put the mended operators wherever vLLM holds the originals; called once in each of vLLM's processes."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if lora_ops.bgmv_shrink is bgmv_shrink:
        return
    for operator in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for holder in (lora_ops, torch_ops, punica_cpu):
            setattr(holder, operator.__name__, operator)
    _mend_prompt_logits(punica_cpu.PunicaWrapperCPU)


def _products(inputs: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each row times the matrix of its slot; zero where it has none. A single slot counts for all rows."""
    weights = weights.squeeze(1) if weights.dim() == 4 else weights
    inputs = inputs.to(dtype)
    used = slots.unique().tolist()
    if len(used) == 1 and used[0] >= 0:
        return torch.nn.functional.linear(inputs, weights[used[0]].to(dtype))
    products = inputs.new_zeros(len(inputs), weights.shape[1])
    for slot in used:
        if slot >= 0:
            rows = slots == slot
            products[rows] = torch.nn.functional.linear(inputs[rows], weights[slot].to(dtype))
    return products


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """Down to the rank, in place of vLLM's operator of that name."""
    products = _products(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)
    output_tensor[:, : products.shape[1]] = scaling * products


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Up from the rank, in place of vLLM's operator of that name."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])  # the two may be padded differently
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Up from the rank into some columns, in place of vLLM's operator of that name."""
    products = _products(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)
    products = products[: len(output_tensor), :slice_size]
    columns = output_tensor[:, slice_offset : slice_offset + slice_size]
    if add_inputs:
        columns += products
    else:
        columns.copy_(products)


def _mend_prompt_logits(wrapper: Any) -> None:
    original = wrapper.add_lora_logits

    def add_lora_logits(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        if len(x) == len(self.sampler_indices):
            return original(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
        first = x.storage_offset() // x.stride(0)  # x is a slice of the batch's hidden states
        sampler, length = self._sampler_indices, self.indices_len[1]
        self._sampler_indices, self.indices_len[1] = self.token_lora_indices[first : first + 1], 1
        try:
            return original(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
        finally:
            self._sampler_indices, self.indices_len[1] = sampler, length

    wrapper.add_lora_logits = add_lora_logits


def mend_seeds() -> None:
    """Keep generators of requests whose prompt is not read yet out of sampling; called as `mend_lora`."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sample_tokens
    if getattr(original, "mended", False):
        return

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators  # row of the batch -> generator
        unfinished = {row: generators.pop(row) for row in list(generators) if self.discard_request_mask.np[row]}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(unfinished)

    sample_tokens.mended = True
    CPUModelRunner.sample_tokens = sample_tokens
