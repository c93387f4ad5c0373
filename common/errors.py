"""The one exception that users are meant to see."""


class QuasarError(Exception):
    """Something the user can put right: one line that names the file, flag or value and what would be right.

    The command line prints it and exits with code 2; libraries may catch it.
    """
