"""Read instructions and dialogues, and encode them by the chat template of the tokenizer."""

from collections.abc import Iterable, Iterator
from itertools import takewhile, zip_longest
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.data import Located, Row, parse_cell
from common.errors import InputError, brief

#: a message has `role`, `content` and `learned`: whether it is in the loss
Message = dict[str, Any]

#: template of tokenizers that have none
PLAIN = (
    "{% for message in messages %}{{ '\n\n' if not loop.first else '' }}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ eos_token or '' if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '\n\n### Assistant:\n' if add_generation_prompt else '' }}"
)

#: stands for an answer in a rendered dialogue, to find where the answer begins and ends
_HOLE = "\ue000"

#: names of roles in files -> roles of chat templates
_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool",
    "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
#: columns of an instruction, of more text for it, and of its answer (Alpaca, Dolly)
_ALPACA, _DOLLY = ("instruction", "input", "output"), ("instruction", "context", "response")


class _Unusable(Exception):
    """The row is no dialogue; the message says why."""


# Rows to messages


def is_dialogue(row: Row) -> bool:
    """Return whether a row holds messages, or an instruction with its answer."""
    lists = ("messages", "conversations", "conversation")
    pair = isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list)
    return pair or any(name in row for name in lists) or any({c[0], c[2]} <= row.keys() for c in (_ALPACA, _DOLLY))


def to_messages(row: Row, answered: bool = True) -> list[Message]:
    """Return the messages of a row, up to the last answer.

    Args:
        row: has `messages` or `conversations` (a list of role and content, or of from and value); `instruction`,
            `input` and `output`, optionally with `system` and `history`; or `prompt` and `completion` as lists.
        answered: end with the last answer. Otherwise end before it, with what is to be answered.

    Raises:
        InputError: the row has no valid dialogue, or no answer; the message says why.
    """
    try:
        messages = _messages(row)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answered:
            if not any(messages[i]["learned"] for i in answers):
                raise _Unusable("has no answer of the assistant; add one or remove the row")
            return messages[: answers[-1] + 1]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise _Unusable("has no message to answer; add one")
        return messages
    except _Unusable as error:
        raise InputError(str(error)) from None


def _messages(row: Row) -> list[Message]:
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            return _system(row) + _listed(row[name], name)
    if isinstance(row.get("prompt"), list):
        return _listed(row["prompt"], "prompt") + _listed(row.get("completion") or [], "completion")
    columns = _DOLLY if "response" in row and "output" not in row else _ALPACA
    instruction, more, answer = (row.get(name) for name in columns)
    for name, value in zip(columns, (instruction, more, answer), strict=True):
        if value is not None and not isinstance(value, str):
            raise _Unusable(f"{name} is {brief(value)}; needed: a text")
    if not (instruction or "").strip():
        raise _Unusable("instruction is blank; fill it or remove the row")
    question = instruction if not (more or "").strip() else f"{instruction}\n\n{more}"
    earlier: list[Message] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Unusable(f"history has {brief(pair)}; needed: pairs of question and answer")
        earlier += [_message("user", pair[0], "history"), _message("assistant", pair[1], "history")]
    answers = [] if not (answer or "").strip() else [_message("assistant", answer, columns[2])]
    return [*_system(row), *earlier, _message("user", question, "instruction"), *answers]


def _system(row: Row) -> list[Message]:
    text = row.get("system")
    return [_message("system", text, "system")] if isinstance(text, str) and text.strip() else []


def _listed(items: Any, name: str) -> list[Message]:
    if isinstance(items, str) and items.lstrip().startswith("["):  # a cell of a table
        try:
            items = parse_cell(items)
        except ValueError as error:
            raise _Unusable(f"{name} is no list: {error}") from None
    if not isinstance(items, list) or not items:
        raise _Unusable(f"{name} is {brief(items)}; needed: a list of messages")
    messages = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise _Unusable(f"{name}: message {number} is {brief(item)}; needed: an object with role and content")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise _Unusable(f"{name}: message {number} has the role {brief(role)}; known: {', '.join(_ROLES)}")
        if item.get("tool_calls") or item.get("function_call"):
            raise _Unusable(f"{name}: message {number} calls a tool, which the recipe does not support; remove the row")
        message = _message(_ROLES[role.lower()], content, f"{name}: message {number}")
        messages.append(message | {"learned": message["learned"] and item.get("weight") != 0})
    return messages


def _message(role: str, content: Any, place: str) -> Message:
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise _Unusable(f"{place}: content is {brief(content)}; needed: a text")
    if role == "assistant" and not content.strip():
        raise _Unusable(f"{place}: the answer is blank; fill it or remove the row")
    return {"role": role, "content": content, "learned": role == "assistant"}


def prepare(sources: dict[str, Iterable[Located]], domain: str | None) -> dict[str, Iterable[Located]]:
    """Replace each row of the splits by its `messages`, `id`, and the column `domain`."""

    def converted(rows: Iterable[Located]) -> Iterator[Located]:
        for where, row in rows:
            if isinstance(row, str):
                yield where, row
            elif not is_dialogue(row):
                needed = "messages, conversations, or instruction and output, as the first row has"
                yield where, f"needed: {needed}; columns here: {', '.join(map(str, row)) or 'none'}"
            else:
                try:
                    yield where, {"messages": to_messages(row)} | {k: row[k] for k in ("id", domain) if k in row}
                except InputError as error:
                    yield where, str(error)

    return {split: converted(rows) for split, rows in sources.items()}


def question(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row before its first answer."""
    return list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))


def plain_text(messages: list[Message]) -> str:
    """Return the text of a dialogue, from which a new tokenizer learns."""
    return "\n\n".join(f"### {message['role'].capitalize()}:\n{message['content']}" for message in messages)


# Messages to tokens


def set_template(tokenizer: PreTrainedTokenizerFast, choice: str = "auto") -> bool:
    """Give the tokenizer the template `PLAIN` if it has no chat template, or if `choice` is "plain".

    Returns:
        Whether the tokenizer has `PLAIN` now.
    """
    if choice == "plain" or not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
    return tokenizer.chat_template == PLAIN


def render(tokenizer: PreTrainedTokenizerFast, messages: list[Message], prompt: bool = False) -> str:
    """Write messages by the chat template of the tokenizer, with the begin of an answer if `prompt`.

    Raises:
        InputError: the template refuses the messages.
    """
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of the tokenizer refuses a dialogue of {roles}: {error}; correct the dialogue, or give "
            "--chat_template plain"
        ) from None


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of the tokens that end an answer: eos, and the special token after an answer in the template."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _HOLE}]
    end = render(tokenizer, chat).rpartition(_HOLE)[2]
    encoder = DialogueEncoder(tokenizer)
    first = encoder.with_special.encode(end, add_special_tokens=False).ids[:1]
    return sorted({i for i in first if i in encoder.special} | ({tokenizer.eos_token_id} - {None}))


def learned_parts(tokenizer: PreTrainedTokenizerFast, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Return the characters of the learned answers in a rendered dialogue, with the marks that end them.

    Raises:
        InputError: the template changes an answer, so that it cannot be found.
    """
    parts, position = [], 0
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if not message["learned"]:
            found = text.find(content, position)
            position = found + len(content) if found >= 0 else position
            continue
        with_hole = message | {"content": message["content"].replace(content, _HOLE, 1)}
        head, _, end = render(tokenizer, [*messages[:i], with_hole]).rpartition(_HOLE)
        begins = (render(tokenizer, messages[:i], prompt=True), head)
        starts = [len(begin) for begin in begins if begin and text.startswith(begin)]
        found = next((at for at in starts if text.startswith(content, at)), -1)
        if found < 0:
            found = text.find(content, min(starts, default=position))
        if found < 0:
            raise InputError(
                f"the chat template of the tokenizer changes the answer {brief(content)}; give --chat_template plain"
            )
        position = found + len(content)
        for mark, here in zip(end, text[position:], strict=False):
            if mark != here:
                break
            position += 1
        parts.append((min([*starts, found]), position))
    return parts


class DialogueEncoder:
    """Encode dialogues: the special tokens of the template act as such, those in a message are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.with_special = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.with_special.no_truncation()
        self.with_special.no_padding()
        self.with_special.encode_special_tokens = False
        added = tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.first = first

    def encode(
        self, text: str, messages: list[Message], prompt: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a rendered dialogue, without a begin token, and the characters of each token."""
        encoding = self.with_special.encode(text, add_special_tokens=False)
        contents = _contents(self.tokenizer, text, messages, prompt)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            written = i in self.special and any(first <= start and end <= last for first, last in contents)
            if written and self.tokenizer.split_special_tokens:
                literal = self.tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
                ids += literal
                offsets += [(start, end)] * len(literal)
            else:
                ids.append(i)
                offsets.append((start, end))
        return (ids[1:], offsets[1:]) if ids[:1] == [self.first] else (ids, offsets)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a dialogue and of the begin of its next answer."""
        return self.encode(render(self.tokenizer, messages, prompt=True), messages, prompt=True)[0]

    def marked(self, messages: list[Message], learned: int, given: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a dialogue, and a mark for each: `learned` in an answer, else `given`."""
        text = render(self.tokenizer, messages)
        parts = learned_parts(self.tokenizer, messages, text)
        ids, offsets = self.encode(text, messages)
        marks = [learned if any(a < last and first < b for first, last in parts) else given for a, b in offsets]
        return ids, marks


def _contents(
    tokenizer: PreTrainedTokenizerFast, text: str, messages: list[Message], prompt: bool
) -> list[tuple[int, int]]:
    """Return the characters of the messages in a rendered dialogue."""
    contents = [message["content"].strip() for message in messages]
    with_holes = [m | {"content": m["content"].replace(c, _HOLE, 1)} for m, c in zip(messages, contents, strict=True)]
    between = render(tokenizer, with_holes, prompt).split(_HOLE)
    found, position = [], 0
    if text == "".join(map("".join, zip_longest(between, contents, fillvalue=""))):
        for before, content in zip(between, contents, strict=False):
            found.append((position + len(before), position + len(before) + len(content)))
            position = found[-1][1]
        return found
    for content in contents:  # what the template writes depends on the contents
        start = text.find(content, position)
        if start >= 0:
            position = start + len(content)
            found.append((start, position))
    return found
