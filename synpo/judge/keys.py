"""The key of a server: where it is read, and how it is kept out of everything that is written."""

import os
from pathlib import Path
from urllib.parse import urlsplit

KEY_VARIABLE = "OPENAI_API_KEY"
REDACTED = "[key]"


class Key:
    """A secret that no printing shows: repr and str are "[key]"."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return REDACTED

    def reveal(self) -> str:
        """The key itself, for the one place that sends it."""
        return self._secret

    def redact(self, text: str) -> str:
        """The text without the key, should a server have echoed it."""
        return text.replace(self._secret, REDACTED) if self._secret else text


def read_key(file: Path | None = None) -> Key:
    """The key in a file (its only line), else in the environment variable OPENAI_API_KEY, else an empty one.

    Servers of one's own mostly need none. Errors: ValueError naming the file, never what is in it.
    """
    if file is None:
        return _checked(os.environ.get(KEY_VARIABLE, ""), f"environment variable {KEY_VARIABLE}")
    try:
        secret = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"key file {str(file)!r}: {reason}") from None
    if not secret.strip():
        raise ValueError(f"key file {str(file)!r} is empty; it holds the key and nothing else")
    return _checked(secret, f"key file {str(file)!r}")


def _checked(secret: str, where: str) -> Key:
    secret = secret.strip()
    if not all("!" <= character <= "~" for character in secret):
        raise ValueError(f"{where}: a key is one word of ASCII characters")
    return Key(secret)


def check_url(url: str) -> str:
    """The address of a server, without the slash at its end.

    Errors: ValueError for one that is not http(s), and for one that carries a password or a query: addresses are logged
    and written beside the results, and a secret in them would be too.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("url: an address such as https://host/v1 is needed")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"url of {parts.hostname}: leave user names, passwords and queries out of it; give the key in a file"
        )
    return url.rstrip("/")
