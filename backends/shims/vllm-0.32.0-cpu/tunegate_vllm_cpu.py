"""vLLM plug-in (entry point `vllm.general_plugins`): on the CPU, rows without an adapter get no adapter's weights.

vLLM marks a row that uses no adapter with slot index -1. Its CPU operators index the stacked adapter weights with
that number, which in torch is the last slot: in a batch that mixes rows, those without an adapter are answered with
the weights of whichever adapter lies there. Every LoRA path of the CPU goes through `bgmv_shrink` first; once its
result is zero, what the expand step adds is zero too.

`VLLM_PLUGINS` (a comma-separated list of plug-ins to load) without `tunegate_cpu_lora` switches it off.
"""

import torch


def mend_lora() -> None:
    """Put the mended operator wherever vLLM holds the original; called once in each of vLLM's processes."""
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
        output_tensor[: len(lora_indices_tensor)].masked_fill_(without_adapter, 0)

    bgmv_shrink.mended = True
    for holder in (lora_ops, torch_ops, punica_cpu):
        holder.bgmv_shrink = bgmv_shrink
