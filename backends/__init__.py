"""What an engine is, and the three that Tunegate speaks to: vLLM, SGLang and LMDeploy."""
