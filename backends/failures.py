"""Why an engine did not start, found in its own log: a table from what engines write to one sentence with advice.

The first row whose pattern occurs anywhere in the log wins, so a root cause stands above what it drags behind it.
`{0}`, `{1}` … in a sentence are the pattern's groups. A row of one engine alone has that engine's wording; all
rows are tried for every engine, because they share libraries.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Cause(NamedTuple):
    """A row: what the log says, and what to tell the person."""

    pattern: str
    sentence: str


_OUT_OF_MEMORY = (
    "The machine ran out of memory and the kernel killed the engine (`dmesg` shows it); serve a smaller model, lower "
    "--memory-fraction, or start fewer --replicas."
)

CAUSES = (
    # -- the command line
    Cause(
        r"unrecognized arguments: ([^\n]+)",
        "The engine does not know the argument {0}; correct --engine-arg or the engine's version.",
    ),
    Cause(
        r"argument --max-lora-rank: invalid choice: '?(\d+)'? \(choose from ([^)]+)\)",
        "The engine does not allow an adapter rank limit of {0}; set --max-adapter-rank to one of {1}.",
    ),
    Cause(
        r"(?:argument --|invalid )(tool|reasoning)(?:-call| call)?[- ]parser: (?:invalid choice: )?'?([\w.-]+)'? "
        r"\((?:choose|chose) from ([^)]+)\)",
        "The engine has no {0} parser called {1}; choose one of {2}.",
    ),
    Cause(
        r"Reasoning parser '([\w.-]+)' not found. Available parsers: ([^\"\n]+)",
        "The engine has no reasoning parser called {0}; choose one of {1}.",
    ),
    Cause(
        r"argument (--[\w/-]+): (invalid [^\n]+|expected [^\n]+)",
        "The engine refuses the argument {0}: {1}",
    ),
    Cause(
        r"(?:Address already in use|address already in use|Port is already in use|EADDRINUSE)",
        "Another process took the engine's port before it could; start again.",
    ),
    # -- the machine
    Cause(
        r"(The NVIDIA driver on your system is too old[^\n.]*)",
        "{0}; update the driver, or install an engine version built for an older CUDA.",
    ),
    Cause(
        r"(?:No CUDA GPUs are available|Found no NVIDIA driver|Torch not compiled with CUDA enabled"
        r"|Failed to infer device type|libcuda\.so\.1: cannot open shared object|no CUDA-capable device is detected"
        r"|No NVIDIA GPU detected|CUDA driver initialization failed)",
        "The engine found no CUDA device; check that `nvidia-smi` works here, or serve with --device cpu "
        "(vLLM and SGLang).",
    ),
    Cause(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "--tp times --pp asks for {0} GPUs and this machine has {1}; lower them.",
    ),
    Cause(
        r"invalid device ordinal",
        "--tp times --pp asks for more GPUs than this machine shows; lower them or check CUDA_VISIBLE_DEVICES.",
    ),
    Cause(
        r"no kernel image is available for execution on the device",
        "The engine was not built for this GPU's generation; install another version of it.",
    ),
    Cause(
        r"No space left on device",
        "The disk (or /dev/shm) is full; free some space, the engine needs it to start.",
    ),
    Cause(
        r"(?:NCCL error|ncclUnhandledCudaError|ncclSystemError)[^\n]*",
        "The GPUs could not be connected (NCCL); try with --tp 1, and look for NCCL WARN lines in the log.",
    ),
    # -- memory
    Cause(
        r"To serve at least one request with the models?'?s? max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, "
        r"which is larger than the available KV cache memory \(([\d.]+) GiB\)",
        "A request of {0} tokens needs {1} GiB of KV cache and {2} GiB are left for it; lower --max-model-len or raise "
        "--memory-fraction.",
    ),
    Cause(
        r"(?:No available memory for the cache blocks|Not enough memory\. Please try to increase --mem-fraction-static"
        r"|No enough gpu memory for (?:kv|state) cache|No enough gpu memory for runtime)",
        "The weights leave no memory for the KV cache; raise --memory-fraction, use more GPUs (--tp), or serve a "
        "quantized checkpoint.",
    ),
    Cause(
        r"Free memory on device [^\n]*?\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory",
        "Only {0} of the GPU's {1} GiB are free; end what else uses it or lower --memory-fraction.",
    ),
    Cause(
        r"The memory capacity is unbalanced[^\n]*?pre_model_load_memory=(\d+)[^\n]*?local_gpu_memory=(\d+)",
        "One of the engine's GPUs has {0} GiB free where another has {1}, and SGLang wants them alike; end what else "
        "uses them, or choose others with CUDA_VISIBLE_DEVICES.",
    ),
    Cause(
        r"Available memory on node \d+ \(([\d.]+)/([\d.]+) GiB\)[^\n]*?is less than",
        "Only {0} of the machine's {1} GiB are free; end what else uses it, lower --memory-fraction, or serve a "
        "smaller model.",
    ),
    Cause(
        r"(?:CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation"
        r"|CUDA runtime error: out of memory)",
        "The GPU ran out of memory; lower --memory-fraction or --max-model-len, use more GPUs (--tp), or serve a "
        "quantized checkpoint.",
    ),
    Cause(
        r"(?:Failed core proc\(s\): \{[^}]*: -9|scheduler died during initialization \(exit code: -9\)"
        r"|DefaultCPUAllocator: (?:can't|not enough)|Cannot allocate memory)",
        _OUT_OF_MEMORY,
    ),
    # -- an adapter listed at start
    Cause(
        r"in _download_adapters[\s\S]*?'repo_name' or 'namespace/repo_name': '([^']+)'",
        "The adapter directory {0} is gone; upload the adapter again or delete it.",
    ),
    Cause(
        r"in load_lora_weights[\s\S]*?The size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
        "An adapter was made for another base model: its weights are {1} wide where this model has {0}; delete it.",
    ),
    # -- the model
    Cause(
        r"(?:requires you to execute the configuration file|trust_remote_code=True|contains custom code)",
        "The checkpoint brings its own Python code; if you trust it, add --engine-arg=--trust-remote-code.",
    ),
    Cause(
        r"Model architectures \[([^\]]+)\] are not supported",
        "The engine has no implementation of {0}; try another --backend or a newer engine version.",
    ),
    Cause(
        r"model type `?'?([\w.-]+)'?`? but Transformers does not recognize this architecture",
        "The engine's transformers does not know the model type {0}; try a newer engine version.",
    ),
    Cause(
        r"(\w+) has no SGlang implementation and the Transformers implementation is not compatible",
        "SGLang has no implementation of {0}; try --backend vllm or a newer engine version.",
    ),
    Cause(
        r"(\w+) does not support LoRA yet",
        "The engine cannot use adapters with {0}; serve it with --adapter-slots 0.",
    ),
    Cause(
        r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        "The model's {0} attention heads cannot be shared out over --tp {1}; choose a --tp that divides {0}.",
    ),
    Cause(
        r"(?:assert self\.total_num_heads % tp_size == 0|not divisible by tp=\d+|is not divisible by \d+)",
        "The model cannot be shared out over this --tp; choose one that divides its number of attention heads.",
    ),
    Cause(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "--max-model-len {0} is more than the {1} tokens the model was made for; lower it.",
    ),
    Cause(
        r"User-specified context_length \((\d+)\) is greater than the derived context_length \((\d+)\)",
        "--max-model-len {0} is more than the {1} tokens the model was made for; lower it.",
    ),
    Cause(
        r"Quantization method specified in the model config \(([^)]+)\) does not match the quantization "
        r"method specified in the `quantization` argument \(([^)]+)\)",
        "The checkpoint is quantized as {0} and --quantization says {1}; leave --quantization out.",
    ),
    Cause(
        r"(?:The quantization method|Quantization method:?) ([\w-]+) is not supported for the current GPU[^\n]*?"
        r"[Mm]inimum capability: (\d+)",
        "This GPU is too old for {0} quantization, which needs compute capability {1} (tenths); serve another format.",
    ),
    Cause(
        r"Quantization scheme is not supported for the current GPU",
        "This GPU is too old for the checkpoint's quantization; serve another format.",
    ),
    Cause(
        r"(?:Unknown quantization method: |Cannot find the config file for )([\w-]+)",
        "The checkpoint is not what --quantization {0} says, or the engine does not know that method; leave "
        "--quantization out to have it read from the checkpoint.",
    ),
    Cause(
        r"(?:torch\.)?(\w+) is not supported for quantization method ([\w-]+)",
        "{1} checkpoints cannot be computed in {0}; set --dtype float16 or bfloat16.",
    ),
    Cause(
        r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0",
        "This GPU has no bfloat16; set --dtype float16.",
    ),
    Cause(
        r"(?:Invalid repository ID or local directory specified|Can't load the configuration of"
        r"|does not appear to have a file named config\.json|is not a valid model identifier"
        r"|Repo id must (?:be in the form|use alphanumeric)|is not a local folder|Should have a `model_type` key"
        r"|No such file or directory: '[^'\n]*config\.json')",
        "The model's directory does not hold a checkpoint with a config.json; check --model.",
    ),
    Cause(
        r"(?:Cannot find any model weights|no file named (?:model|pytorch_model)[\w.]*"
        r"|No such file or directory: '[^'\n]*\.safetensors')",
        "The model's directory holds no weights (*.safetensors); pull or copy the checkpoint again.",
    ),
    Cause(
        r"(?:Error while deserializing header|SafetensorError|InvalidHeaderDeserialization)",
        "A weight file of the model is damaged or cut short; pull or copy the checkpoint again.",
    ),
    # -- kernels that are compiled on this machine: FlashInfer's, SGLang's
    Cause(
        r"(?:Could not find nvcc and default|nvcc not found|Ninja build failed|ninja: build stopped)",
        "The engine compiles kernels for this GPU and could not: nvcc is missing, too old, or failed (the log says "
        "which); install a CUDA toolkit that fits the engine's torch and set CUDA_HOME. For SGLang's sampling kernels "
        "alone, --engine-arg=--sampling-backend=pytorch goes without.",
    ),
    # -- the environment; late, because an engine also logs imports it can do without
    Cause(
        r"(?:No package metadata was found for|ModuleNotFoundError: No module named) '?([\w.-]+)'?",
        "The engine's environment lacks the package {0}; install the engine again (`gateway engines install`).",
    ),
    Cause(
        r"Multi-nodes support requires `ray`",
        "The engine's environment lacks the package ray, without which LMDeploy takes no adapters with --tp; install "
        "the engine again (`gateway engines install`).",
    ),
    Cause(
        r"ImportError: ([^\n]+)",
        "The engine's environment is broken ({0}); install the engine again (`gateway engines install`).",
    ),
    # -- killed without a word of its own; SGLang ends itself so when a child of it fails, and says so
    Cause(
        r"\A(?![\s\S]*Received sigquit from a child)[\s\S]*engine ended by SIGKILL, not sent by the gateway",
        _OUT_OF_MEMORY,
    ),
)


def find(log: str) -> str | None:
    """The first cause of the table that the log shows, as a sentence; None if it shows none."""
    for cause in CAUSES:
        if match := re.search(cause.pattern, log):
            return cause.sentence.format(*match.groups(default=""))
    return None
