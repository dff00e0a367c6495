"""Real engines on a real GPU, as restartable stages: `python -m scripts.gpu_suite --out DIR [STAGE ...]`."""
