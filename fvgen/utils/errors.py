"""The one exception that means "the input is bad and the user can mend it"."""


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong and what to do; the command line exits with status 2."""
