"""The artefacts that a training run reads, opened and checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_offgrpo.artifacts import Manifest, fingerprint_of, require_input
from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data.vocabulary import require_known_ids
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.hf_config import (
    ARCHITECTURE,
    Architecture,
    architecture_differences,
    read_architecture,
)
from megatron_offgrpo.objective.needs import needs_reference
from megatron_offgrpo.planning.plan import Plan, build_plan, validation_plan
from megatron_offgrpo.planning.plan_files import load_plan, require_settings
from megatron_offgrpo.training.checkpoint_folder import require_latest
from megatron_offgrpo.training.reference_cache import ReferenceCache, inputs_of, open_reference


@dataclass(frozen=True)
class Inputs:
    """The artefacts of a run, checked against each other."""

    store: TrajectoryStore
    plan: Plan
    validation: Plan | None
    """One step over the store's validation groups; None where the run does not validate."""
    reference: ReferenceCache | None
    """None where the objective does not read it."""
    initial: Path
    """Checkpoint the run starts from."""
    manifest: Manifest
    """Of the run."""
    architecture: Architecture


def open_inputs(run: RunConfig) -> Inputs:
    """Opens store, plan, reference and initial checkpoint, and refuses what does not belong together."""
    store = TrajectoryStore.open(run.paths.store)
    remedy = run.command("plan")
    plan = load_plan(run.paths.plan, remedy=remedy)
    require_input(
        plan.manifest,
        "store",
        store.manifest.fingerprint,
        where=Path(run.paths.plan),
        other=run.paths.store,
        remedy=remedy,
    )
    require_settings(plan, run.plan, run.objective, where=run.paths.plan, remedy=remedy)
    initial, weights = require_latest(run.paths.megatron)
    architecture = open_architecture(run, store, weights)
    reference = None
    if needs_reference(run.objective):
        wanted = inputs_of(store, weights.fingerprint, run.model.precision, architecture)
        reference = open_reference(run.paths.reference, store, wanted, remedy=run.command("reference"))
    validation = validation_plan(store, run.plan, run.objective) if run.validation.every_steps else None
    fingerprints = {
        "store": store.manifest.fingerprint,
        "plan": plan.manifest.fingerprint,
        "weights": weights.fingerprint,
        "tokenizer": store.manifest.inputs["tokenizer"],
    }
    if reference is not None:
        fingerprints["reference"] = reference.manifest.fingerprint
    config = to_dict(run)
    manifest = Manifest(
        kind="run",
        fingerprint=fingerprint_of(fingerprints, config),
        inputs=fingerprints,
        counts={"steps": plan.num_steps},
        config=config,
    )
    return Inputs(store, plan, validation, reference, initial, manifest, architecture)


def open_architecture(run: RunConfig, store: TrajectoryStore, weights: Manifest) -> Architecture:
    """The student's architecture, after its config.json was found to fit the checkpoint and the store.

    Args:
        weights: manifest of the checkpoint; one of another program records no architecture.

    Raises:
        ConfigError: no such model, or the checkpoint was written with another architecture.
        DataError: the store has token ids beyond the vocabulary, which Megatron's padding rows would take.
    """
    hf = run.paths.hf_model
    architecture = read_architecture(hf)
    recorded = weights.counts.get(ARCHITECTURE)
    differing = architecture_differences(architecture, recorded) if recorded is not None else []
    if differing:
        raise ConfigError(
            "config.json is not that of the checkpoint (config.json and checkpoint: " + "; ".join(differing) + ")",
            where=f"{hf}/config.json",
            remedy=f"offgrpo convert hf-to-megatron --hf {hf} --megatron {run.paths.megatron} --overwrite, "
            "or --set paths.hf_model=FOLDER",
        )
    require_known_ids(store.largest_id, architecture.vocab_size, hf, where=str(store.path))
    return architecture


def leave_out(inputs: Inputs, trajectories: Sequence[int], run: RunConfig) -> Inputs:
    """The inputs with a plan without these trajectories, made from the same store and settings.

    The run stays the same one: its manifest goes on naming the plan on disk.

    Raises:
        ConfigError | DataError: what is left cannot be planned.
    """
    if not trajectories:
        return inputs
    return replace(inputs, plan=build_plan(inputs.store, run.plan, run.objective, quarantine=trajectories))
