"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """An error that a user caused and can mend.

    The message is one line: what is wrong, where (gin binding, file and line), and the mend.
    Command lines print it without a traceback and exit with status 1.
    """
