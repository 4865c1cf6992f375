"""Cleaning of one text: a pure function, so that training, evaluation and prediction see the same text."""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

from distllm.config.schema import CleanConfig

# Cc but tab and newline; and what has no width: soft hyphen, joiners, marks and embeddings of direction, byte order mark.
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
HIDDEN = frozenset({"script", "style", "template"})
INLINE = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd",
    "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u",
    "var", "wbr",
})  # fmt: skip


def clean(text: str, config: CleanConfig) -> str:
    """Clean a text as the config asks; unchanged where all is off.

    HTML goes first, as an entity can stand for a control character; lower case after the Unicode form, which can make capitals
    (NFKC of a mathematical A); and white space last, as dropping leaves gaps.

    Args:
        text: any text.
        config: which of the five steps to take.
    """
    if config.html:
        text = visible(text)
    if config.unicode != "none":
        text = unicodedata.normalize(config.unicode, text)
    if config.lowercase:
        text = text.lower()
    if config.control:
        text = CONTROL.sub("", text)
    if config.whitespace:
        text = " ".join(text.split())
    return text


def cleans(config: CleanConfig) -> bool:
    """Whether the config asks for any cleaning."""
    return config != CleanConfig()


def told(config: CleanConfig) -> str:
    """What a config asks for, as data.clean takes it: "lowercase=true, unicode=NFC"; "none" where all is off."""
    given = config.model_dump(exclude_defaults=True)
    return ", ".join(f"{name}={'true' if value is True else value}" for name, value in given.items()) or "none"


def visible(text: str) -> str:
    """The text that a browser would show: no tags, comments, scripts and styles, entities resolved.

    A tag that begins a block, such as `<p>` or `<br>`, parts words by a newline; one inside a line, such as `<b>`, does not.
    """
    if "<" not in text and "&" not in text:
        return text
    # html.parser stops with an error at `<![` of anything but CDATA, which a text may well hold.
    text = CDATA.sub(lambda match: _escaped(match[1]), text).replace("<![", "&lt;![")
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return "".join(reader.parts)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


class _Reader(HTMLParser):
    """Collects the text between tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        self._part(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._part(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN and self.hidden > 0
        self._part(tag)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def _part(self, tag: str) -> None:
        if tag not in INLINE and tag not in HIDDEN and not self.hidden and self.parts and not self.parts[-1].endswith("\n"):
            self.parts.append("\n")
