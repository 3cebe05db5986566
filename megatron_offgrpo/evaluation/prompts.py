"""Prompt templates: a problem as the token ids that a model continues."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_offgrpo.data.chat import question, render
from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.data.vocabulary import require_known_ids, vocabulary_of
from megatron_offgrpo.errors import DataError

TemplateName = Literal["chat", "qwen-math", "simplerl", "prime", "none"]

# The texts of qwen-math, simplerl and prime are those of LUFFY's evaluation (Yan et al. 2025, ElliottYan/LUFFY,
# eval_scripts/generate_vllm.py: `apply_qwen_math_template`, `simplerl_template`, `make_conv_zero`), letter by letter.
QWEN_MATH = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{{}}.<|im_end|>\n"
    "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
)
"""Also the prompt of Qwen2.5-Math's own evaluation (qwen25-math-cot)."""
# The doubled braces and the missing space before the box stand so in what was published.
SIMPLERL = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{problem}\n"
    "Please reason step by step, and put your final answer within\\boxed{{{{}}}}.<|im_end|>\n<|im_start|>assistant\n"
)
PRIME = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {problem}\n\n"
    "Present the answer in LaTex format: \\boxed{{Your answer}}. Assistant:"
)
TEXTS: dict[TemplateName, str] = {
    "qwen-math": QWEN_MATH,
    "simplerl": SIMPLERL,
    "prime": PRIME,
    "none": "{problem}",
}
TEMPLATES: tuple[TemplateName, ...] = ("chat", "qwen-math", "simplerl", "prime", "none")


def load_prompt_tokenizer(folder: Path, template: TemplateName) -> Any:
    """The tokenizer in `folder`; one without a chat template serves every template but `chat`.

    Raises:
        DataError: no usable tokenizer there.
    """
    if template == "chat":
        return load_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as cause:  # transformers raises OSError, ValueError, KeyError, ... on damaged folders
        message = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DataError(f"cannot load the tokenizer ({message})", where=str(folder)) from None
    if tokenizer.eos_token_id is None:
        raise DataError("this tokenizer has no EOS token", where=str(folder))
    return tokenizer


def prompt_text(
    tokenizer: Any,
    problem: str,
    system: str | None,
    template: TemplateName = "chat",
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The whole prompt, up to where the response begins.

    Args:
        variables: what the chat template is given beside the messages; see `chat_format`.

    Raises:
        DataError: the model's chat template refuses the problem, or a system message goes with a fixed template.
    """
    if template != "chat":
        if system is not None:
            raise DataError("this template has its own system text", where="template", got=template, remedy="use chat")
        return TEXTS[template].format(problem=problem)
    try:
        return render(tokenizer, question(problem, system), variables or {})
    except Exception as cause:  # templates raise jinja2 errors of many kinds, `raise_exception` among them
        raise DataError(f"the chat template refuses this problem ({cause})", where=problem[:80]) from None


def encode_prompt(tokenizer: Any, problem: str, system: str | None, template: TemplateName = "chat") -> tuple[int, ...]:
    """Token ids of a problem under a template, up to where the response begins."""
    return prompt_ids(tokenizer, prompt_text(tokenizer, problem, system, template), template)


def prompt_ids(tokenizer: Any, text: str, template: TemplateName) -> tuple[int, ...]:
    """Token ids of a whole prompt."""
    plain = tokenizer.encode(text, add_special_tokens=False)
    if template not in ("prime", "none"):
        return tuple(plain)  # it writes its own special tokens
    # A plain text gets what the tokenizer puts before one (a BOS), and not what it closes one with (an EOS).
    marked = tokenizer.encode(text, add_special_tokens=True)
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return tuple(marked[: start + len(plain)])
    raise DataError("the tokenizer's special tokens change the text", where="tokenizer", got=text[:80])


def require_known_prompts(prompts: Mapping[str, Sequence[int]], stop: Sequence[int], model: Path) -> None:
    """Refuses a tokenizer that is larger than its model, where that shows.

    Args:
        prompts: problem id -> token ids.
        stop: end tokens; the model must be able to write one of them.

    Raises:
        DataError: an id of a prompt is beyond the model's vocabulary, or every end token is.
    """
    vocabulary = vocabulary_of(model)
    for name, ids in prompts.items():
        require_known_ids(max(ids, default=0), vocabulary, model, where=f"prompt of {name}")
    require_known_ids(min(stop), vocabulary, model, where="end token of the tokenizer")
