"""vLLM plug-in (entry point `vllm.general_plugins`): on the CPU, each row gets the weights of its own adapter or none.

vLLM marks a row that uses no adapter with slot index -1. Its CPU operators index the stacked adapter weights with
that number, which in torch is the last slot: in a batch that mixes rows, those without an adapter are answered with
the weights of whichever adapter lies there. Every LoRA path of the CPU goes through `bgmv_shrink` first; once its
result is zero, what the expand step adds is zero too.

Logits are computed for one row a request, and vLLM knows the slots of those rows. For the logprobs of a prompt it
computes the logits of all of one request's rows, and takes the same slots: where the numbers differ, the engine dies.
They are given the slot of that request instead.

`VLLM_PLUGINS` (a comma-separated list of plug-ins to load) without `tunegate_cpu_lora` switches it off.
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

    original = lora_ops.bgmv_shrink
    if getattr(original, "mended", False):
        return

    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        without_adapter = (lora_indices_tensor < 0).unsqueeze(1)
        output_tensor[: len(inputs)].masked_fill_(without_adapter, 0)  # one index counts for all rows

    bgmv_shrink.mended = True
    for holder in (lora_ops, torch_ops, punica_cpu):
        holder.bgmv_shrink = bgmv_shrink
    _mend_prompt_logits(punica_cpu.PunicaWrapperCPU)


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
