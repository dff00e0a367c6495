"""Will the engine load this quantized checkpoint? Known before it starts, from the checkpoint's headers and a table.

The table is quant/rules.toml; only the parts of `quant` that read headers are imported here.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.base import UnsupportedSpec
from backends.envs import EMULATOR
from backends.spec import EngineSpec
from quant.errors import BadCheckpoint, UnsupportedModel
from quant.rules import Facts, Verdict, judge, read_facts, turbomind_knows

_TURBOMIND, _PYTORCH = "lmdeploy-turbomind", "lmdeploy-pytorch"


def check_checkpoint(spec: EngineSpec) -> None:
    """Refuse a quantized checkpoint that the engine would not load. Raises UnsupportedSpec with the reason.

    One that is not quantized, or in a form that the table does not cover, passes: the engine speaks for itself.
    """
    if not any(spec.model_path.glob("*.safetensors")):
        return
    try:
        facts = read_facts(spec.model_path)
    except UnsupportedModel:
        return
    except BadCheckpoint as error:
        raise UnsupportedSpec(str(error)) from error
    check_facts(facts, spec)


def check_facts(facts: Facts, spec: EngineSpec) -> None:
    """Refuse what is known of a quantized checkpoint, there or still to be made. Raises UnsupportedSpec."""
    try:
        # The emulator plays its engine on any device.
        verdicts = judge(facts, spec.backend, None if spec.version == EMULATOR else spec.device)
    except UnsupportedModel:
        return  # no rule for this engine on this device
    for engine in _engines(facts, spec):
        own = [verdict for verdict in verdicts if verdict.engine == engine]
        if own and all(verdict.outcome == "refused" for verdict in own):
            raise UnsupportedSpec(_refusal(facts, spec, own[0], verdicts))


def _engines(facts: Facts, spec: EngineSpec) -> tuple[str, ...]:
    """The names in the table of what would run: LMDeploy is two engines, and only one of them takes adapters."""
    if spec.backend != "lmdeploy":
        return (spec.backend,)
    if "pytorch" in spec.engine_args or not turbomind_knows(facts):
        return (_PYTORCH,)
    return (_TURBOMIND, _PYTORCH) if spec.adapter_slots else (_TURBOMIND,)


def _refusal(facts: Facts, spec: EngineSpec, verdict: Verdict, verdicts: Sequence[Verdict]) -> str:
    taking = {other.engine for other in verdicts if other.outcome != "refused"}
    if verdict.engine == _TURBOMIND and _PYTORCH in taking:
        advice = "its PyTorch engine takes it: add --engine-arg=--backend --engine-arg=pytorch"
    elif verdict.engine == _PYTORCH and _TURBOMIND in taking:
        advice = "adapters need that engine; TurboMind takes it without adapters: add --adapter-slots 0"
    else:
        others = sorted({other.engine for other in judge(facts) if other.outcome != "refused"} - {spec.backend})
        advice = f"taken by {', '.join(others)}" if others else "no engine takes it"
    return (
        f"{verdict.engine} on {verdict.device} does not load the {facts.scheme.format} checkpoint {spec.model_path}: "
        f"{'; '.join(verdict.reasons)} (checked against {verdict.verified}); {advice}"
    )
