"""The configuration of a run: frozen dataclasses that a recipe function fills in.

A recipe is a function without required arguments that returns a `RunConfig`; a variant changes a few fields of
another with `dataclasses.replace`. Nothing stands between the recipe and the run but `--set path=value`
(`megatron_offgrpo/overrides.py`). Callables (an objective's parts) are `functools.partial`s or plain functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.ranges import Count, Natural, NonNegative, Positive, Ranged, Seed

WeightMode = Literal["constant", "token", "sequence", "group"]
AllPositiveRule = Literal["set", "add", "none"]
CheckpointFormat = Literal["sharded", "reshardable"]
Decay = Annotated[float, Ge(0), Lt(1)]
"""Share of its old value that a running mean keeps at each step."""
FP8_MULTIPLE = 16
"""What fp8 products want both sides of a matrix to be a multiple of."""


@dataclass(frozen=True)
class PathsConfig:
    """Where the artefacts are; every stage reads and writes here."""

    hf_model: str = ""
    """Hugging Face folder of the student before training: configuration, tokenizer, safetensors."""
    store: str = ""
    """STORE: tokenised trajectory groups (`offgrpo prepare`)."""
    megatron: str = ""
    """MEGATRON CHECKPOINT the run starts from (`offgrpo convert hf-to-megatron`)."""
    reference: str = ""
    """REFERENCE: log-probs of the reference model (`offgrpo reference`)."""
    plan: str = ""
    """PLAN: steps, packs and token weights (`offgrpo plan`)."""
    output: str = ""
    """Where training writes checkpoints, metrics and its manifest."""


@dataclass(frozen=True)
class PlanConfig(Ranged, section="plan"):
    """Which trajectories form which pack in which step. Independent of the number of GPUs."""

    epochs: Count = 1
    groups_per_step: Count = 32
    """Trajectory groups (problems) in one optimizer step; the last step of an epoch takes what remains."""
    trajectories_per_group: Annotated[int, Ge(1), Le(4096)] | None = 8
    """K. A longer group is cut to its first K; None takes each group as it is."""
    short_groups: Literal["keep", "cycle"] = "keep"
    """A group with fewer than K: `keep` it short, or `cycle` its trajectories up to K."""
    drop_silent_groups: bool = False
    """Leave out groups whose advantages, KL and entropy terms all vanish; refused where a KL or entropy term exists."""
    max_pack_tokens: Count = 32768
    """T, the most tokens in a pack (one micro-batch of one data-parallel rank)."""
    pack_multiple: Count = 64
    """Packs are padded to a multiple of this; must be divisible by tp (sequence parallelism) and 2*cp."""
    equal_parts: Count = 16
    """A step of this many packs or more is packed in so many parts of nearly equal tokens and equally many packs, so
    that data-parallel ranks whose number divides it get equal work; 1 makes the fewest packs."""
    share_prompts: Literal["auto", "never", "always"] = "auto"
    """Store and compute a group's prompt once in each pack that has members of it; each response attends to it and to
    itself. `auto`: where that can save 5 % of the tokens or more."""
    seed: Seed = 0
    """Order of the groups; epoch e is shuffled with (seed, e)."""
    shuffle: bool = True


@dataclass(frozen=True)
class ObjectiveConfig(Ranged, section="objective"):
    """loss = sum_t w_t surrogate(logp_t, mu_t, A_i) + v_t (beta kl(logp_t, ref_t) - c H_t); see docs/objective.md."""

    advantage: Callable[..., Any]
    """(rewards_G, on_policy_G) -> A_G; one of megatron_offgrpo.objective.advantages."""
    surrogate: Callable[..., Any]
    """(logp, mu, advantage) -> loss per token; one of megatron_offgrpo.objective.surrogates."""
    kl: Callable[..., Any]
    """(logp, ref) -> estimate of KL(pi || ref) per token; one of megatron_offgrpo.objective.divergences."""
    all_positive: AllPositiveRule = "set"
    """Groups in which every reward is 1: `set` makes A = b, `add` makes A + b, `none` leaves A."""
    all_positive_bias: NonNegative = 0.1
    """b."""
    beta: NonNegative = 0.2
    """Weight of the KL term; with 0 no reference is needed."""
    entropy_coefficient: NonNegative = 0.001
    """c, the weight of the entropy bonus."""
    weight: WeightMode = "constant"
    """w_t: constant 1/(B L_max), token 1/(tokens in step), sequence 1/(B |o_i|), group 1/(groups * its tokens)."""
    kl_weight: WeightMode | None = None
    """v_t, the weight of the KL and entropy terms; None: as `weight`."""
    max_response_tokens: Count = 31744
    """L_max of the `constant` mode."""
    mask_truncated: bool = False
    """Give the tokens of responses cut at the maximum length (no EOS) weight 0."""


@dataclass(frozen=True)
class OptimizerConfig(Ranged, section="optimizer"):
    """AdamW on fp32 master weights, sharded over data-parallel ranks."""

    lr: NonNegative = 1e-7
    min_lr: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Natural = 0
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip_grad: NonNegative = 1.0
    """Maximum global gradient norm; 0 does not clip."""
    cpu_offload: bool = False
    """Keep master weights and moments in the CPU's memory and update there (Megatron's HybridDeviceOptimizer): a GPU
    holds 12 bytes a parameter less, a step takes longer. Needs bf16 and `checkpoint.format` reshardable."""


@dataclass(frozen=True)
class LayoutConfig(Ranged, section="layout"):
    """How the model lies on the processes; data parallelism takes the rest of them."""

    tp: Count = 1
    pp: Count = 1
    vpp: Count = 1
    """Virtual pipeline stages per pipeline rank."""
    cp: Count = 1
    ep: Count = 1
    sequence_parallel: bool = False
    processes: Count = 1
    """Local processes that a plainly started command makes; under torchrun or srun their world size counts."""

    def data_parallel_size(self, world_size: int) -> int:
        """dp = world / (tp pp cp).

        Raises:
            ConfigError: the processes do not divide evenly, or the layout contradicts itself.
        """
        model_parallel = self.tp * self.pp * self.cp
        if world_size < 1 or world_size % model_parallel:
            raise ConfigError(
                "the number of processes does not fit the layout",
                where="layout",
                expected=f"a multiple of tp*pp*cp = {self.tp}*{self.pp}*{self.cp} = {model_parallel}",
                got=f"{world_size} processes",
                remedy="change layout.tp, layout.pp or layout.cp, or the number of processes",
            )
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "sequence parallelism needs tensor parallelism",
                where="layout.sequence_parallel",
                expected="tp > 1",
                got="tp = 1",
            )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                "virtual pipeline stages need pipeline parallelism", where="layout.vpp", expected="pp > 1", got="pp = 1"
            )
        dp = world_size // model_parallel
        if (dp * self.cp * self.tp) % self.ep:
            raise ConfigError(
                "expert parallelism does not divide the ranks of a pipeline stage",
                where="layout.ep",
                expected=f"a divisor of {dp * self.cp * self.tp}",
                got=self.ep,
            )
        return dp


@dataclass(frozen=True)
class ModelConfig(Ranged, section="model"):
    """How the model is computed."""

    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """bf16 computes in bf16 and keeps fp32 master weights. fp8: so too, but the linear layers multiply in fp8, each
    tensor scaled by its own largest value; needs `layer` transformer_engine."""
    layer: Literal["portable", "transformer_engine"] = "portable"
    """`portable`: on torch's kernels, anywhere. `transformer_engine`: linear layers and norms are Transformer Engine's,
    on GPUs; keys of checkpoints are the same."""
    recompute: Literal["none", "selective", "full"] = "none"
    head_chunk_mebibytes: Count = 64
    """Size of one fp32 [tokens, V_local] chunk in the log-prob head. Logits of a pack that fit into it are kept for the
    backward pass; otherwise they are computed again."""
    router: Literal["trained", "frozen", "balanced"] = "trained"
    """Of a mixture of experts: `trained` by the objective alone, `frozen` as it is, or `balanced`: trained, and
    Megatron's load-balancing loss is added."""
    balance_coefficient: NonNegative = 0.001
    """Weight of the load-balancing loss of each layer, with `balanced`."""

    @property
    def weight_precision(self) -> Literal["fp32", "bf16"]:
        """In which weights are kept and everything but fp8's products is computed."""
        return "fp32" if self.precision == "fp32" else "bf16"


@dataclass(frozen=True)
class CheckpointConfig(Ranged, section="checkpoint"):
    """When training saves."""

    every_steps: Natural = 50
    """0 saves at the end only (and on SIGTERM or SIGUSR1)."""
    keep: Natural = 2
    """Number of the newest checkpoints kept, beside the best; 0 keeps all."""
    asynchronous: bool = True
    """Write beside the training; the next save, and the end of the run, wait for the one before."""
    format: CheckpointFormat = "sharded"
    """Of the optimizer's state in routine saves. `sharded`: each rank writes its own part, which the same tp, pp, vpp
    and ep load. `reshardable`: gathered on the first data-parallel rank, any layout loads it; so are the best
    checkpoint and the last one of the run in any case."""


@dataclass(frozen=True)
class ValidationConfig(Ranged, section="validation"):
    """The objective on the groups that the store sets apart (`offgrpo prepare --validation-share`)."""

    every_steps: Natural = 0
    """0 does not validate; else also after the last step."""
    metric: str = "probability_margin"
    """The one of the logged metrics by which a checkpoint is the best."""
    best: Literal["highest", "lowest"] = "highest"
    keep_best: bool = True
    """Save where the metric is better than ever before, and keep that checkpoint beside the newest."""


@dataclass(frozen=True)
class FaultConfig(Ranged, section="fault"):
    """What training does when something goes wrong."""

    timeout_seconds: Positive = 1800.0
    """A step, load or save that takes longer ends the run with the stacks of every rank in OUTPUT/stacks."""
    bad_step: Literal["halt", "skip"] = "halt"
    """A step whose loss or gradient is NaN or inf, or whose gradient norm is above `max_grad_norm`."""
    max_grad_norm: NonNegative = 0.0
    """Gradient norm before clipping that makes a step bad; 0 sets no bound."""
    max_bad_steps: Count = 3
    """With `skip`: after so many bad steps in a row the run goes back to its newest checkpoint, and on without the
    trajectories of the packs that these steps have named."""
    max_rollbacks: Natural = 3
    """One more than so many end the run; 0 ends it with the first `max_bad_steps` in a row."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where the metrics go besides metrics.jsonl and TensorBoard."""

    wandb_project: str = ""
    """Project on Weights & Biases (the extra `tracking`); empty: none."""


@dataclass(frozen=True)
class RunConfig(Ranged):
    """Everything a run depends on."""

    name: str
    objective: ObjectiveConfig
    paths: PathsConfig = PathsConfig()
    plan: PlanConfig = PlanConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    layout: LayoutConfig = LayoutConfig()
    model: ModelConfig = ModelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    fault: FaultConfig = FaultConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: Seed = 0
    """Megatron's random state; only dropout uses it, and the recipes have none."""
    typed: str = field(default="", compare=False)
    """Recipe and `--set` options as they were typed, for the commands that messages name; no part of what a run is."""

    def command(self, stage: str, *options: str) -> str:
        """`offgrpo STAGE` for this configuration, as a person would type it."""
        return " ".join(["offgrpo", stage, self.typed or self.name, *options])

    def check_layout(self, world_size: int) -> None:
        """Refuses a layout that these processes or this plan cannot take.

        Raises:
            ConfigError: naming the field.
        """
        layout = self.layout
        layout.data_parallel_size(world_size)
        pieces = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sequence_parallel else 1)
        if self.plan.pack_multiple % pieces:
            raise ConfigError(
                "context and sequence parallelism split every pack",
                where="plan.pack_multiple",
                expected=f"a multiple of 2 cp (with cp > 1) times tp (with sequence parallelism) = {pieces}",
                got=self.plan.pack_multiple,
            )
        multiple = FP8_MULTIPLE * layout.cp * (layout.tp if layout.sequence_parallel else 1)
        if self.model.precision == "fp8" and self.plan.pack_multiple % multiple:
            raise ConfigError(
                f"fp8 multiplies blocks of {FP8_MULTIPLE} tokens, and each rank has a share of every pack",
                where="plan.pack_multiple",
                expected=f"a multiple of {FP8_MULTIPLE} cp times tp (with sequence parallelism) = {multiple}",
                got=self.plan.pack_multiple,
                remedy=f"--set plan.pack_multiple={multiple}, and plan again",
            )


def with_values(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """A copy of `config` with some fields of some sections replaced: `with_values(c, plan={"epochs": 3})`."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})
