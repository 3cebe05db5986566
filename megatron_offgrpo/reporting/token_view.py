"""One group token by token: where the prompt ends, what is trained on, where EOS stands."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_offgrpo.data.chat import ChatFormat, chat_format
from megatron_offgrpo.data.store import TrajectoryStore, tokenizer_fingerprint
from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.errors import DataError

PROMPT, RIGHT, WRONG, EOS = "blue", "green", "red", "bold reverse magenta"


def show_group(store: TrajectoryStore, name: str, tokenizer_dir: str | None, console: Console | None = None) -> None:
    """Prints a group; tokens are parted by `|`, the prompt (weight 0) is blue, responses green or red, EOS reversed.

    Raises:
        DataError: no such group, or a tokenizer that is not the store's.
    """
    group = _find(store, name)
    row = store.row(group)
    chat = _chat(store, tokenizer_dir)
    console = console or Console(highlight=False, soft_wrap=True)
    apart = ", set apart for validation" if row.validation else ""
    console.print(Text(f"group {row.group_id} (number {group}, {row.origin}), reference answer {row.answer!r}{apart}"))
    console.print(Text(f"prompt: {len(row.prompt_ids)} tokens, weight 0"))
    console.print(_tokens(chat, row.prompt_ids, PROMPT))
    for index, ids in enumerate(row.response_ids):
        label = (row.label_sources or [""] * len(row.rewards))[index]
        cut = row.truncated[index]
        end = "cut at the maximum length, no EOS" if cut else f"ends in {chat.end_text}"
        console.print(
            Text(
                f"response {index}: reward {row.rewards[index]:.0f} by {label} ({row.label_statuses[index]}), "
                f"{len(ids)} tokens with weight, {end}"
            )
        )
        console.print(_tokens(chat, ids, RIGHT if row.rewards[index] == 1 else WRONG))


def _find(store: TrajectoryStore, name: str) -> int:
    ids = store.table["group_id"].to_pylist()
    if name in ids:
        return int(ids.index(name))
    if name.isdigit() and int(name) < store.num_groups:
        return int(name)
    expected = f"a group id such as {ids[0]!r}, or a number below {store.num_groups}"
    raise DataError("no such group", where="--group", expected=expected, got=name)


def _chat(store: TrajectoryStore, folder: str | None) -> ChatFormat:
    path = folder or store.manifest.config.get("tokenizer", "")
    if not path or not Path(path).is_dir():
        raise DataError("the store's tokenizer is not here", where=path or "manifest", remedy="pass --tokenizer FOLDER")
    found, wanted = tokenizer_fingerprint(path), store.manifest.inputs["tokenizer"]
    if found != wanted:
        raise DataError("not the store's tokenizer", where=path, expected=wanted, got=found)
    return chat_format(load_tokenizer(Path(path)), store.manifest.config.get("chat_template_kwargs"))


def _tokens(chat: ChatFormat, ids: list[int], style: str) -> Text:
    shown = Text()
    for place, token in enumerate(ids):
        piece = chat.tokenizer.decode([token]).replace("\n", "↵\n")
        shown.append("|" if place else "", style="dim")
        shown.append(piece, style=EOS if token == chat.end else style)
    return shown
