"""The one exception that users are meant to see."""

_HEAD, _TAIL = 600, 300  # kept of a longer line


class QuasarError(Exception):
    """Something the user can put right: one line that names the file, flag or value and what would be right.

    The command line prints it and exits with code 2; libraries may catch it. A line that quotes much is cut in its
    middle.
    """

    def __init__(self, line: str) -> None:
        lost = len(line) - _HEAD - _TAIL
        super().__init__(line if lost <= 0 else f"{line[:_HEAD]}... ({lost} characters) ...{line[-_TAIL:]}")


def shorten(text: str, most: int = 120) -> str:
    """What a file says, for a line that quotes it: on one line, and cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
