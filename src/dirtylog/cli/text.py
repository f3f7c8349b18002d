"""Text that a peer had a part in."""


def printable(text: str) -> str:
    """The text as one line that does nothing to a terminal: what is not printable is escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
