"""Short reasons from the messages of other libraries' errors."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, without a full stop at its end.

    The name of the error's class if there is no message, as some libraries have it.
    """
    for line in str(error).splitlines():
        if line.strip(" \t."):
            return line.strip().rstrip(".")
    return type(error).__name__
