"""The quantizer beside GPTQModel and llm-compressor, in one run: `python -m tests.proofs.quant_peers`."""
