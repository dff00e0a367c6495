"""Four-bit (and eight-bit) checkpoints that vLLM, SGLang and LMDeploy load directly, with the damage measured.

`quant.cli` and everything static (`rules`, `formats`, `headers`, `config`) import without torch.
"""
