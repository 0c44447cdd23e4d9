"""Conversations in a data file. A message is a role and a text; whatever else it holds is refused by name.

Nothing is dropped without a word: a model that never sees the call of a tool learns to end its turn where the call was.
Beside its messages a line may describe itself in numbers and texts (id, source, prompt_id). Lists, objects and the
names in MEANT would change what there is to learn, and are refused too.
"""
from bpe_from_scratch import valid_unicode
from cli import InputError
from formats import excerpt

ROLES = ("system", "user", "assistant")
MEANT = ("tools", "functions", "tool_choice", "parallel_tool_calls", "function_call", "system", "instruction",
         "context", "completion", "response", "output", "chosen", "rejected", "label", "weight", "chat_template",
         "enable_thinking", "reasoning_content", "reasoning_effort", "response_format")
DESCRIBING = ("meta", "metadata")   # objects that are known to be about the line
EMPTY = (None, "", [], {})          # tables have every column in every row


def read_conversation(line):
    """The messages [{"role": ..., "content": ...}, ...] of a line. Raises InputError that names what would be lost."""
    messages = line["messages"]
    if "text" in line:
        raise InputError(f'"messages" ({excerpt(messages)}) beside a "text": a line is one or the other;'
                         " remove one of them")
    if not isinstance(messages, list):
        raise InputError(f'"messages" is {excerpt(messages)}, not a list like'
                         ' [{"role": "user", "content": "..."}, ...]')
    refuse({key: value for key, value in line.items() if key not in ("messages", *DESCRIBING)
            and (key in MEANT or isinstance(value, (list, dict)))})
    for number, message in enumerate(messages, start=1):
        try:
            check_message(message)
        except InputError as error:
            raise InputError(f"message {number}: {error}") from None
    if all(message["role"] != "assistant" for message in messages):
        raise InputError("a conversation without an assistant turn: there is nothing to learn")
    return [{key: valid_unicode(message[key]) for key in ("role", "content")} for message in messages]


def check_message(message):
    if not isinstance(message, dict) or "role" not in message:
        raise InputError(f'expected {{"role": "...", "content": "..."}}, found {excerpt(message)}')
    if message["role"] not in ROLES:
        raise InputError(f'the role is {excerpt(message["role"])}, not one of {", ".join(ROLES)}')
    refuse({key: value for key, value in message.items() if key not in ("role", "content")})
    content = message.get("content")
    if not isinstance(content, str):
        raise InputError(f'"content" is {excerpt(content)}, not a text' if "content" in message
                         else 'there is no "content"')
    if message["role"] == "assistant" and not content.strip():
        raise InputError("the assistant says nothing, which would teach it to end its turn at once; remove the message")


def refuse(not_read):
    """Raises InputError for the first of these that holds something."""
    for key, value in not_read.items():
        if value not in EMPTY:
            raise InputError(f'"{key}" is not understood, and would be dropped: {excerpt(value)}; remove it, or'
                             ' write it'
                             " into the content of a message")
