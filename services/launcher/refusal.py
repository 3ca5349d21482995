"""The one way in which a command says no."""


class UserError(Exception):
    """One line that says what is wrong and what to do; the command ends with exit code 2 and leaves nothing running."""
