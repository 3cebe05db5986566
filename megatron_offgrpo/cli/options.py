"""Options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_offgrpo.errors import ConfigError

Recipe = Annotated[
    str, typer.Argument(help="A function in recipes/ (quickstart, openthinker3_7b, ...) or module:function.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. plan.epochs=3; may be repeated.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although a finished result is there.")]

Model = Annotated[Path, typer.Option("--model", help="Hugging Face folder.")]
BackendChoice = Annotated[
    Literal["auto", "vllm", "hf", "server"],
    typer.Option("--backend", help="auto: vLLM where installed, else hf. server: an OpenAI-compatible endpoint."),
]
Precision = Annotated[Literal["auto", "fp32", "bf16"], typer.Option("--precision")]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel", min=1, help="GPUs of one vLLM engine.")]
ServerUrl = Annotated[str | None, typer.Option("--server-url", help="http://HOST:PORT/v1")]
ServerModel = Annotated[str | None, typer.Option("--server-model", help="Its name there; by default the only one.")]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Requests under way at a server.")]
JudgeUrl = Annotated[
    str | None, typer.Option("--judge", help="http://HOST:PORT/v1: asked about answers that no rule reads.")
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="Its name there; by default the only one.")]
Timeout = Annotated[float, typer.Option("--timeout-seconds", help="Longest wait for a server's completion.")]
ShardOption = Annotated[
    str | None, typer.Option("--shard", help="I/N: draw this share only; the same command without it finishes.")
]
Seed = Annotated[int, typer.Option("--seed")]
System = Annotated[str | None, typer.Option("--system", help="System message of the chat template.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from the k most probable tokens; 0: from all.")]
MinP = Annotated[float, typer.Option("--min-p", min=0.0, max=1.0, help="Least share of the greatest probability.")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="1: none.")]
PresencePenalty = Annotated[float, typer.Option("--presence-penalty", help="0: none.")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", help="0: none.")]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", help='Variables of the chat template, as JSON: {"enable_thinking": false}.'),
]
ThinkTags = Annotated[
    list[str] | None,
    typer.Option("--think-tags", help="OPEN...CLOSE in place of the known tags; repeatable."),
]


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The JSON object given to an option; an empty one where it was not given.

    Raises:
        ConfigError: something else than a JSON object.
    """
    try:
        value = {} if text is None else json.loads(text)
    except ValueError as cause:
        raise ConfigError(f"no JSON ({cause})", where=option, got=text) from None
    if not isinstance(value, dict):
        raise ConfigError("no JSON object", where=option, expected='for example {"enable_thinking": false}', got=text)
    return value


def print_lines(lines: list[str]) -> None:
    """Prints what a command found."""
    print("\n".join(lines))
