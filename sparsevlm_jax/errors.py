"""The one exception that a user causes and a command line reports in one line, and what goes into its message."""

_LONGEST = 200  # characters of what a file or another library says


class UserError(ValueError):
    """Bad input: a file, key, shape or option that the caller can put right.

    The message is one line that names the thing and says what to do. The command line prints it on
    stderr and exits with code 2; nothing else is caught there, so a traceback always means a bug.
    """


def shown(value: object) -> str:
    """A value that came out of a file, for a message: printable, on one line, and cut where it is long."""
    return _cut(f'"{value}"' if isinstance(value, str) else str(value))


def first_line(error: Exception) -> str:
    """What another library's error says first."""
    return _cut((str(error).strip() or type(error).__name__).splitlines()[0])


def _cut(text: str) -> str:
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()
