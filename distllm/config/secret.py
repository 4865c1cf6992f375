"""What looks like a password or a key of some service: never taken into a config, never sent to a tracker."""

from __future__ import annotations

import re

VALUE = re.compile(
    # A whole-value match for 40 hex digits (a W&B key), since hub caches have such names inside paths.
    r"^(?:local-)?[0-9a-f]{40}$|\bwandb_v\d_[\w-]{20,}|\b(?:hf|api_org)_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}"
    r"|\bgh[pousr]_\w{20,}|github_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
)
_NAME = re.compile(r"(api|access|secret|private|auth)[_-]?(key|token)|passw(or)?d|secret|credential", re.IGNORECASE)
_WORDS = {"key", "apikey", "token", "secrets", "passphrase", "pwd", "credentials", "bearer", "auth"}
_SPECIAL_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "special", "image", "audio", "video", "decoder"}


def names_secret(name: str) -> bool:
    """Whether a key's name can mean nothing but a secret: `api_key`, `hf_access_token`, `password`."""
    return bool(_NAME.search(name))


def may_name_secret(name: str) -> bool:
    """Whether a text under this name may be a secret: also `hf.token` and `key`; not `tokenizer` or `eos_token`."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = {word for word in re.split(r"[^a-z0-9]+", words) if word}
    return names_secret(name) or (bool(_WORDS & parts) and not _SPECIAL_TOKENS & parts)
