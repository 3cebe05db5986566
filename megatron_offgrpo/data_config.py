"""The configuration of data preparation: what recipes for data fill in, and `offgrpo prepare` does."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from megatron_offgrpo.ranges import Count, Natural, Positive, Ranged, Seed, Share

LabelMode = Literal["math-verify", "majority", "given"]
SelectMode = Literal["released", "balanced", "random"]
THINK_TAGS = (
    "<think>...</think>",
    "<thinking>...</thinking>",
    "<thought>...</thought>",
    "<thoughts>...</thoughts>",
    "<reason>...</reason>",
    "<reasoning>...</reasoning>",
    "<seed:think>...</seed:think>",
    "<mm:think>...</mm:think>",
    "[THINK]...[/THINK]",
    "◁think▷...◁/think▷",
    "<|begin_of_thought|>...<|end_of_thought|>",
    "<|START_THINKING|>...<|END_THINKING|>",
    "<|channel|>analysis<|message|>...<|channel|>final<|message|>",
    "<|channel>...<channel|>",
    "<|open|>think<|sep|>...<|close|>think<|sep|>",
)
"""What opens a thought and what closes it, as OPEN...CLOSE; upper and lower case are one. Of models by DeepSeek, Qwen,
ByteDance, MiniMax, Mistral, Moonshot, OpenThoughts, Cohere, OpenAI (gpt-oss), Google and others."""
FormName = Literal[
    "auto", "groups", "solutions", "verl", "openr1", "preference", "sharegpt", "messages", "alpaca", "completion"
]


GradingSeconds = Annotated[float, Ge(1e-3)]
"""CPU seconds for one solution."""


@dataclass(frozen=True)
class FilterConfig(Ranged, section="--"):
    """What is left out although it can be used; by default nothing. All of it is listed in `removed.jsonl`."""

    min_pass_rate: Share = 0.0
    """Least share of right answers among all labelled trajectories of a problem, before any is left out."""
    max_pass_rate: Share = 1.0
    min_trajectories: Count = 1
    """Problems with fewer trajectories after the filters are left out."""
    min_response_tokens: Natural = 0
    """Trajectories with fewer tokens (EOS included) are left out."""
    drop_truncated: bool = False
    """Leave out trajectories longer than max_response_tokens instead of cutting them."""
    drop_without_answer: bool = False
    """Leave out trajectories in which no final answer is found."""
    duplicate_trajectories: bool = False
    """Keep the first of the trajectories of a problem whose texts are equal but for outer white space."""
    duplicate_problems: bool = False
    """Keep the first of the problems whose normalised texts are equal."""
    near_duplicates: Annotated[float, Ge(0.3), Le(1)] | None = None
    """Keep the first of problems that are linked by this Jaccard similarity of word 3-grams or more (0.8, say)."""
    decontaminate: tuple[str, ...] = ()
    """Benchmark files; problems that share an n-gram of words with one of theirs, or its text, are left out."""
    decontaminate_words: Annotated[int, Ge(3), Le(100)] = 13
    """n. Benchmark problems with fewer words count whole."""
    max_foreign_share: Share = 1.0
    """Largest share of a text's letters outside the Latin and Greek scripts, of problems and of trajectories."""
    max_compression_ratio: Positive | None = None
    """Trajectories whose last 4000 characters zlib compresses by more than this are loops (12, say)."""
    max_all_positive_share: Share = 1.0
    """Largest share of groups in the store in which every kept trajectory is right; the seed chooses which go."""


@dataclass(frozen=True)
class PrepareConfig(Ranged, section="--"):
    """What `offgrpo prepare` does."""

    inputs: tuple[str, ...] = ()
    """Files (.jsonl, .json, .csv, each also .gz, .parquet), folders of a dataset, or `hf:NAME`; read in this order."""
    tokenizer: str = ""
    """Hugging Face folder of the student; its tokenizer and chat template are used."""
    output: str = ""
    """Folder of the store."""
    format: FormName = "auto"
    """The form of the records; `auto` takes the first form whose fields a record has."""
    split: str = "train"
    """Split of a Hugging Face dataset; files have none."""
    where: tuple[str, ...] = ()
    """`field=value` conditions on raw records; others are counted as not asked for."""
    labels: tuple[LabelMode, ...] = ("math-verify",)
    """Where rewards come from, in order of preference: the first that a group can have. The others are compared."""
    select: SelectMode = "released"
    """Which K trajectories: alternating right and wrong, equally many of both, or at random."""
    trajectories_per_group: Count = 8
    """K; longer groups are cut to K, shorter ones stay short."""
    max_prompt_tokens: Count = 1024
    """Groups with a longer prompt are rejected."""
    max_response_tokens: Count = 31744
    """Longer responses are cut; they keep their reward and have no EOS."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking`; `strftime_now` is the date where it asks the clock."""
    think_tags: tuple[str, ...] = THINK_TAGS
    """What parts the thought from the final answer."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    validation_share: Annotated[float, Ge(0), Le(0.9)] = 0.0
    """Share of the groups set apart from training; near-duplicates stay on one side."""
    seed: Seed = 0
    """Of the random selection, the validation split and the all-positive groups left out."""
    grading_timeout_seconds: GradingSeconds = 5.0
    """CPU seconds for one solution."""
    judge: str | None = None
    """`http://HOST:PORT/v1` of an OpenAI-compatible server that is asked about answers which no rule reads; its replies
    are kept in OUTPUT.judge.jsonl and not asked for again."""
    judge_model: str | None = None
    """Its model; None takes the only one there."""
    workers: Count | None = None
    """Processes; None takes one for each CPU this process may use."""
    overwrite: bool = False
    """Replace a store that was made from other inputs or settings."""
    force: bool = False
    """Make the store again even if it is finished and fits."""
