"""Fine-tuning of language models into adapters that the gateway serves.

`docs/training.md` says how to use it and walks a step through these files. `config`, `cli`, `data` and `formats`
import no torch.
"""
