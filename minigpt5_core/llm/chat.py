"""How a tokenizer's chat template words a conversation, found out by trying it.

Templates differ: some take no system role, some write a date, some end a reply with another mark than the tokenizer's
eos token or with none, and some word the last reply otherwise than those before. What is trained on must read like what
is told, so such a template is taken apart and its pieces are laid together the same way every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import BadInputError
from .bounded import bounded
from .families.base import Family

# For an LLM whose tokenizer has no chat template: a line a message, each ended by the LLM's own end mark.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
# Of a template that writes today's date: what was trained on should read the same on every day.
DAY, CLOCK = "26 Jul 2024", "strftime_now"
STOPPED = f"{{% macro {CLOCK}(format) %}}{DAY}{{% endmacro %}}"
# No thoughts before a reply, by the names that templates have for it.
SETTINGS = {"enable_thinking": False, "thinking": False, "date_string": DAY}
SYSTEM, ASKED, SAID = "xqsystemx", ("xqonex", "xqtwox", "xqthreex"), ("xrfirstx", "xrsecondx")
EXCHANGES = tuple(zip(ASKED[:2], SAID, strict=True))
CURE = "Take the tokenizer's files from where the model came from, or its chat template out: stories are told without."

Exchange = tuple[str, str | None]  # what is asked, and the reply; None for one still to be told


@dataclass(frozen=True)
class Pieces:
    """What a template writes before the first request, before a reply, after it up to the next request, after the last
    one."""

    head: str
    opening: str
    between: str
    closing: str

    def text(self, system: str, exchanges: Sequence[Exchange]) -> str:
        """The conversation; a reply still to be told is left open."""
        told = [f"{asked}{self.opening}{reply or ''}" for asked, reply in exchanges]
        is_open = bool(exchanges) and exchanges[-1][1] is None
        return self.head.replace(SYSTEM, system) + self.between.join(told) + ("" if is_open else self.closing)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's way to word a conversation. `end` is the id that ends a reply, and `reply_end` what is written for
    it by us, where the template writes none. `pieces` are those of a template that words the same reply in two ways."""

    tokenizer: PreTrainedTokenizerBase
    family: Family
    takes_system: bool = True
    reply_end: str = ""
    end: int = -1
    pieces: Pieces | None = None

    def text(self, system: str, exchanges: Sequence[Exchange]) -> str:
        """The conversation; a last reply still to be told is left open."""
        exchanges = [(asked, None if reply is None else reply + self.reply_end) for asked, reply in exchanges]
        return self.pieces.text(system, exchanges) if self.pieces else self.rendered(system, exchanges)

    def rendered(self, system: str, exchanges: Sequence[Exchange]) -> str:
        """The conversation as the template has it; an empty `system` is none."""
        tokenizer = self.tokenizer
        said = [("system", system)] if system and self.takes_system else []
        for index, (asked, reply) in enumerate(exchanges):
            joined = asked if index or said or not system else f"{system}\n\n{asked}"
            said += [("user", joined)] + ([] if reply is None else [("assistant", reply)])
        content = self.family.content if tokenizer.chat_template else str
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content(text)} for role, text in said],
            chat_template=_template(tokenizer),
            tokenize=False,
            add_generation_prompt=bool(exchanges) and exchanges[-1][1] is None,
            **SETTINGS,
        )


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own, in which no time passes; or a plain one, opened by the bos token of a tokenizer that puts it
    before every text: its LLM never read one without."""
    if tokenizer.chat_template:
        template = tokenizer.get_chat_template()
        return STOPPED + template if CLOCK in template else template
    begun = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begun else "") + PLAIN_TEMPLATE


def find_chat(tokenizer: PreTrainedTokenizerBase, family: Family, ends: set[int]) -> Chat:
    """How this tokenizer's chat template words a conversation. `ends` are the ids that are known to end a reply.

    BadInputError for a template that cannot be used.
    """
    try:
        with bounded():
            chat = Chat(tokenizer, family, _takes_system(tokenizer, family))
            whole = chat.rendered(SYSTEM, [*EXCHANGES, (ASKED[2], None)])
            last = chat.rendered(SYSTEM, list(EXCHANGES))
    except Exception as error:  # a template is somebody else's program: anything may come of it
        raise BadInputError(f"The LLM's chat template fails: {_why(error)}. {CURE}") from error
    if not _holds_all(whole, [SYSTEM, ASKED[0], SAID[0], ASKED[1], SAID[1], ASKED[2]]) or SAID[1] not in last:
        raise BadInputError(
            f"The LLM's chat template leaves out what is said, or moves it: {whole!r:.200}. {CURE}"
        )
    between, after = _cut(whole, SAID[1], ASKED[2]), last.partition(SAID[1])[2]
    end = _end_mark(tokenizer, between, after, ends)
    reply_end = "" if end is not None else tokenizer.eos_token or ""
    chat = Chat(tokenizer, family, chat.takes_system, reply_end, _end_of(tokenizer) if end is None else end)
    if _is_one_text(chat):
        return chat
    mark = tokenizer.convert_ids_to_tokens(chat.end)
    closing = "" if reply_end else between[: between.index(mark) + len(mark)]
    pieces = Pieces(whole.partition(ASKED[0])[0], whole.partition(ASKED[2])[2], between, closing)
    return Chat(tokenizer, family, chat.takes_system, reply_end, chat.end, pieces)


def _why(error: Exception) -> str:
    return f"{error}".strip().rstrip(".")[:300] or type(error).__name__


def _takes_system(tokenizer: PreTrainedTokenizerBase, family: Family) -> bool:
    """Whether a system message is in the text; some templates refuse one, others leave it out."""
    try:
        return SYSTEM in Chat(tokenizer, family).rendered(SYSTEM, [(ASKED[0], SAID[0]), (ASKED[1], None)])
    except TimeoutError:
        raise
    except Exception:  # as jinja's own, which it raises to say so
        return False


def _holds_all(text: str, words: Sequence[str]) -> bool:
    """Whether the words stand in the text in this order, each once."""
    places = [text.find(word) for word in words]
    return places == sorted(places) and all(text.count(word) == 1 for word in words)


def _cut(text: str, first: str, second: str) -> str:
    return text[text.index(first) + len(first) : text.index(second)]


def _end_mark(tokenizer: PreTrainedTokenizerBase, between: str, after: str, ends: set[int]) -> int | None:
    """The first id behind a reply that ends it: a known mark, or a special token that is behind the last one too."""
    special = special_ids(tokenizer)
    marks = ends | (special & set(tokenizer(after, add_special_tokens=False).input_ids))
    found = tokenizer(between, add_special_tokens=False).input_ids
    return next((token for token in found if token in marks), None)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids that no plain text is made of."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise BadInputError(
            "The LLM's tokenizer has no eos token, and its chat template ends a reply by no special token, so that no "
            "reply would ever end. Take the tokenizer's files from where the model came from."
        )
    return tokenizer.eos_token_id


def _is_one_text(chat: Chat) -> bool:
    """Whether every reply stands behind what it is told behind, and an end mark behind every reply."""
    whole, mark = chat.text(SYSTEM, list(EXCHANGES)), chat.tokenizer.convert_ids_to_tokens(chat.end)
    for index, (asked, said) in enumerate(EXCHANGES):
        told = chat.text(SYSTEM, [*EXCHANGES[:index], (asked, None)])
        if not whole.startswith(told) or not whole[len(told) :].lstrip().startswith(said):
            return False
    return mark in whole.rpartition(SAID[1])[2]
