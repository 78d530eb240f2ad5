"""The one exception that a user causes and a command line reports in one line."""


class UserError(ValueError):
    """Bad input: a file, key, shape or option that the caller can put right.

    The message is one line that names the thing and says what to do. The command line prints it on
    stderr and exits with code 2; nothing else is caught there, so a traceback always means a bug.
    """
