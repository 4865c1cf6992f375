"""Which ids of a vocabulary have a role: data find them, models are built by them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Roles:
    """Ids of the tokens that have a role; None where the tokenizer has no such token."""

    eos: int
    """Ends a document, and a target."""
    pad: int | None
    """Fills rows up."""
    begin: int | None
    """Stands before an input: the cls token, else the bos token."""
    separator: int | None
    """Ends an input and stands between the two texts of a pair: the sep token, else `eos`."""
    mask: int | None
    """Stands for a token to guess."""
