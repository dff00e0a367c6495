"""Emulated engines: each speaks the HTTP of vLLM, SGLang or LMDeploy, as recorded of the real one, with no model."""
