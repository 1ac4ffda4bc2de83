"""What training and evaluation refuse."""


class DataError(ValueError):
    """The data set cannot be used as it is; the message names the file and the picture."""
